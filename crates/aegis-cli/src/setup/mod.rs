//! `aegis setup`: everything that machines need and that is not Aegis itself. May be run again at
//! any time; what is there already stays.

pub mod image;
pub mod kernel;
mod modules;
pub mod packages;
mod publish;
pub mod tool;
pub mod vmlinux;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::failure::{Failure, Result};
use crate::home::Home;
use crate::output::{Format, fields, say};

/// What `aegis setup` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
Steps: (1) tools of the host, (2) a guest kernel, taken out of the distribution's package and never \
installed on the host, (3) a base image made with mmdebstrap. What is there already stays.

Examples:
  aegis setup                       look, and ask before anything is installed
  aegis setup --install --yes       install what is missing without asking (root or sudo)
  aegis setup --image tools --include python3-pip,bind9-dnsutils
                                    another image beside base: machines name it
  aegis setup --rebuild             fetch the newest kernel and make a new base image
  aegis setup --kernel ./vmlinux    use a kernel of your own (ELF with PVH entry, or bzImage)")]
pub struct SetupArgs {
    /// Install missing packages with apt-get
    #[arg(long)]
    install: bool,
    /// Do not ask before installing
    #[arg(long, short, requires = "install")]
    yes: bool,
    /// Fetch the kernel and make the image anew
    #[arg(long)]
    rebuild: bool,
    /// A kernel of your own instead of the distribution's
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Modules of that kernel (searched for *.ko); without it, it must have all built in
    #[arg(long, value_name = "DIR", requires = "kernel")]
    modules: Option<PathBuf>,
    /// Release of Debian or Ubuntu that the image is made of [default: the host's]
    #[arg(long, value_name = "NAME")]
    suite: Option<String>,
    /// Which image is made
    #[arg(long, value_name = "NAME", default_value = image::BASE, value_parser = image::parse_name)]
    image: String,
    /// More packages of the distribution for the image; it is made anew if it lacks one
    #[arg(long, value_name = "PACKAGES", value_delimiter = ',', value_parser = image::parse_package)]
    include: Vec<String>,
}

#[derive(Serialize)]
struct Report {
    home: PathBuf,
    tools: Vec<packages::Found>,
    kernel: Part<kernel::Record>,
    image: Part<image::Record>,
}

#[derive(Serialize)]
struct Part<T> {
    new: bool,
    #[serde(flatten)]
    record: T,
}

/// Does it.
pub fn run(home: &Home, args: SetupArgs, format: Format) -> Result<()> {
    if let Err(failure) = home.check_length() {
        // Good enough to build in, for tests; `aegis up` will refuse it.
        say(&format!("warning: {failure}"));
    }
    let tools = packages::ensure(args.install, args.yes)?;
    publish::make_private(home.root())?;
    // Tokens, keys and other people's machines lie here.
    fs::set_permissions(home.root(), fs::Permissions::from_mode(0o700))
        .map_err(|e| Failure::file("close to others", home.root(), e))?;
    let source = kernel::Source {
        kernel: args.kernel,
        modules: args.modules,
        rebuild: args.rebuild,
        may_update_lists: args.install,
    };
    let (record, new) = kernel::ensure(home, &source)?;
    let kernel = Part { new, record };
    let wish = image::Wish {
        name: args.image,
        include: args.include,
        suite: args.suite,
        rebuild: args.rebuild,
    };
    let (record, new) = image::ensure(home, &wish)?;
    let image = Part { new, record };
    let report = Report { home: home.root().to_owned(), tools, kernel, image };
    format.answer(&report, || {
        fields(&[
            ("Home", report.home.display().to_string()),
            ("Kernel", report.kernel.record.version.clone()),
            ("Image", format!("{} {}", report.image.record.name, report.image.record.digest)),
            ("Next", "aegis doctor, then aegis up".into()),
        ])
    })
}
