//! Settings: flags over environment over `aegis.toml` over defaults, in one pure function. Nobody
//! else reads the environment or the file.

mod egress;
mod hatch;
mod images;
mod vers;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use aegis_rules::capability::{Capabilities, CapabilityAsk};
use aegis_rules::capacity::Capacity;
use aegis_rules::idle::Times;
use aegis_rules::refusal::Refusal;
use aegis_wire::egress::ServiceName;
use aegis_wire::host::CapabilityBody;
use aegis_wire::words::{DiskBytes, DurationMs, ImageRef, MemoryMb};
use aegis_wire::worker::Accel;
use serde::Deserialize;

pub use egress::name_servers;
use hatch::{LlmSection, SecretsSection, ServiceSection};
pub use hatch::{Provider, Vendor};
pub use images::Images;
pub use vers::{Vers, VersKey};

/// What was said on the command line.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// `--home`
    pub home: Option<PathBuf>,
    /// `--listen`
    pub listen: Option<String>,
    /// `--no-auth`
    pub no_auth: bool,
    /// `--provisioner`
    pub provisioner: Option<String>,
}

/// What the host has; measured outside, so that this stays pure.
#[derive(Clone, Debug)]
pub struct Host {
    /// Memory, MiB.
    pub memory_mb: u64,
    /// Free disk below the home, bytes.
    pub disk_free: u64,
    /// CPUs.
    pub cpus: u32,
    /// Whom it asks for names itself.
    pub resolvers: Vec<SocketAddr>,
}

/// All settings, valid.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where everything is kept.
    pub home: PathBuf,
    /// TCP address of couch and host API.
    pub listen: SocketAddr,
    /// Serve host routes without a token, on loopback only.
    pub no_auth: bool,
    /// Who makes guests' machines.
    pub provisioner: ProvisionerKind,
    /// Image of machines whose request names none.
    pub default_image: ImageRef,
    /// Primary process of guests' machines.
    pub guest_command: Vec<String>,
    /// Whether that process is expected to serve the agent port.
    pub guest_serves: bool,
    /// How machines are made.
    pub machines: Machines,
    /// What is lent at most.
    pub capacity: Capacity,
    /// What kits may let their instances do.
    pub kits: Capabilities,
    /// After how long without use a machine is paused, and its memory put on disk.
    pub idle: Times,
    /// Who is asked for names in machines' stead.
    pub resolvers: Vec<SocketAddr>,
    /// Who is behind the LLM door, by name.
    pub providers: Vec<Provider>,
    /// What of this host machines may be given, and where it is.
    pub host_services: BTreeMap<ServiceName, SocketAddr>,
    /// Machines with proxy secrets trust an authority of this host's, so that placeholders work inside
    /// of TLS.
    pub tls_ca: bool,
    /// Where images come from.
    pub images: Images,
    /// The account in the vers cloud, where there is one.
    pub vers: Option<Vers>,
    /// Whether this host is a vers cloud for others.
    pub vers_api: bool,
    /// Public ports: first and last.
    pub ports: (u16, u16),
    /// Where machines are reached by name, if they are.
    pub by_name: Option<SocketAddr>,
    /// Address on which public ports listen.
    pub ports_bind: IpAddr,
    /// Requests per second and address on public routes; 0 switches the limit off.
    pub rate_per_second: u32,
    /// Requests at once and address on public routes.
    pub rate_burst: u32,
    /// How the log is written.
    pub log: LogFormat,
    /// What is logged: a level, or levels by module.
    pub log_filter: String,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// A line for people.
    #[default]
    Text,
    /// A JSON object per line.
    Json,
}

/// Who makes guests' machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProvisionerKind {
    /// This host.
    Local,
    /// A person, who then activates the guest.
    Manual,
    /// The vers cloud.
    Vers,
}

/// How machines are made.
#[derive(Clone, Debug)]
pub struct Machines {
    /// Directory of the other programs.
    pub programs: PathBuf,
    /// `qemu-system-x86_64`
    pub qemu: PathBuf,
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Its modules, where it needs any.
    pub modules: Option<PathBuf>,
    /// Hardware or software.
    pub accel: Accel,
    /// Refuse to boot where limits can't be enforced.
    pub require_limits: bool,
    /// Machines that are kept ready for whoever comes next, for each shape in use.
    pub spares: usize,
}

/// A setting that can't be taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {problem}")]
pub struct BadConfig {
    /// Where it came from and its name.
    pub setting: String,
    /// What is wrong and what would pass.
    pub problem: String,
}

fn bad(setting: &str, problem: impl ToString) -> BadConfig {
    BadConfig { setting: setting.to_owned(), problem: problem.to_string() }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileConfig {
    listen: Option<String>,
    no_auth: Option<bool>,
    provisioner: Option<ProvisionerKind>,
    default_image: Option<String>,
    #[serde(default)]
    guest: GuestSection,
    #[serde(default)]
    machines: MachinesSection,
    #[serde(default)]
    capacity: CapacitySection,
    #[serde(default)]
    idle: IdleSection,
    #[serde(default)]
    kits: CapabilityBody,
    #[serde(default)]
    egress: egress::Section,
    #[serde(default)]
    llm: LlmSection,
    #[serde(default)]
    host_services: BTreeMap<String, ServiceSection>,
    #[serde(default)]
    router: RouterSection,
    #[serde(default)]
    secrets: SecretsSection,
    #[serde(default)]
    images: images::Section,
    #[serde(default)]
    vers: vers::Section,
    #[serde(default)]
    vers_api: vers::ApiSection,
    #[serde(default)]
    ports: PortsSection,
    #[serde(default)]
    rate_limit: RateSection,
    #[serde(default)]
    log: LogSection,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct GuestSection {
    command: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MachinesSection {
    programs: Option<PathBuf>,
    qemu: Option<PathBuf>,
    kernel: Option<PathBuf>,
    modules: Option<PathBuf>,
    accel: Option<Accel>,
    require_limits: Option<bool>,
    spares: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CapacitySection {
    machines: Option<u32>,
    memory_mb: Option<u32>,
    disk_gb: Option<f64>,
    vcpus: Option<u32>,
}

/// What kits may let their instances do: what `[kits]` leaves out is as here.
fn kits(said: CapabilityBody) -> Result<Capabilities, Refusal> {
    let said = said.parse()?;
    CapabilityAsk {
        spawn: said.spawn.or(Some(true)),
        spawn_depth: said.spawn_depth.or(Some(1)),
        max_children: said.max_children.or(Some(5)),
        allowed_images: said.allowed_images.or_else(|| Some(vec!["*".to_owned()])),
        max_memory: said.max_memory.or(Some(MemoryMb(2048))),
        max_vcpus: said.max_vcpus.or(Some(2)),
        max_expose_ports: said.max_expose_ports.or(Some(8)),
        ..said
    }
    .granted()
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct IdleSection {
    pause_after_secs: Option<u64>,
    suspend_after_secs: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RouterSection {
    listen: Option<String>,
}

/// `127.0.0.1:8099`, another address, or `off`.
fn by_name(section: RouterSection) -> Result<Option<SocketAddr>, BadConfig> {
    match section.listen.as_deref().unwrap_or("127.0.0.1:8099") {
        "off" => Ok(None),
        address => address.parse().map(Some).map_err(|_| {
            bad("router.listen", format!("{address} is neither ADDRESS:PORT nor off"))
        }),
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct PortsSection {
    range: Option<(u16, u16)>,
    bind: Option<IpAddr>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RateSection {
    per_second: Option<u32>,
    burst: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogSection {
    format: Option<LogFormat>,
    filter: Option<String>,
}

/// The home directory: flag over `AEGIS_HOME` over `~/.aegis`.
pub fn home(flags: &Flags, env: &BTreeMap<String, String>) -> Result<PathBuf, BadConfig> {
    let home = match (&flags.home, env.get("AEGIS_HOME"), env.get("HOME")) {
        (Some(home), _, _) => home.clone(),
        (None, Some(home), _) if !home.is_empty() => PathBuf::from(home),
        (None, _, Some(user)) if !user.is_empty() => Path::new(user).join(".aegis"),
        _ => return Err(bad("home", "give --home or set AEGIS_HOME")),
    };
    if !home.is_absolute() {
        return Err(bad("home", format!("{} is not an absolute path", home.display())));
    }
    Ok(home)
}

/// Longest time without use before a machine is paused, seconds.
const IDLE_SECS_MAX: u64 = 30 * 86_400;
/// Most spare machines of a shape.
const SPARES_MAX: usize = 16;

/// Longest home for which every unix socket's path fits in the kernel's 107 bytes.
pub const HOME_MAX: usize = 107 - "/run/inst-01ARZ3NDEKTSV4RRFFQ69G5FAV/worker.sock".len();

/// Builds the settings. `programs` is the directory of the running program.
pub fn build(
    flags: &Flags,
    env: &BTreeMap<String, String>,
    file: Option<&str>,
    programs: &Path,
    host: Host,
) -> Result<Config, BadConfig> {
    let home = home(flags, env)?;
    if home.as_os_str().len() > HOME_MAX {
        return Err(bad(
            "home",
            format!(
                "{} is longer than {HOME_MAX} bytes; sockets below it would not fit",
                home.display()
            ),
        ));
    }
    let file: FileConfig = match file {
        None => FileConfig::default(),
        Some(text) => toml::from_str(text).map_err(|e| bad("aegis.toml", e))?,
    };
    let var = |name: &str| env.get(name).filter(|v| !v.is_empty()).cloned();

    let listen = flags
        .listen
        .clone()
        .or_else(|| var("AEGIS_LISTEN"))
        .or(file.listen)
        .unwrap_or_else(|| "127.0.0.1:3000".to_owned());
    let listen: SocketAddr = listen.parse().map_err(|_| {
        bad("listen", format!("{listen} is not ADDRESS:PORT, as in 127.0.0.1:3000"))
    })?;
    let no_auth = flags.no_auth
        || match var("AEGIS_NO_AUTH").as_deref() {
            None => file.no_auth.unwrap_or(false),
            Some("1" | "true") => true,
            Some("0" | "false") => false,
            Some(other) => {
                return Err(bad("AEGIS_NO_AUTH", format!("{other} is not true or false")));
            }
        };
    if no_auth && !listen.ip().is_loopback() {
        return Err(bad("no-auth", format!("only on a loopback address, and {listen} is none")));
    }
    let provisioner =
        match flags.provisioner.clone().or_else(|| var("AEGIS_PROVISIONER")).as_deref() {
            None => file.provisioner.unwrap_or(ProvisionerKind::Local),
            Some("local") => ProvisionerKind::Local,
            Some("manual") => ProvisionerKind::Manual,
            Some("vers") => ProvisionerKind::Vers,
            Some(other) => {
                return Err(bad("provisioner", format!("{other} is not local, manual or vers")));
            }
        };
    let vers = vers::read(file.vers, &var)?;
    vers::check(provisioner, vers.as_ref())?;
    let default_image = var("AEGIS_DEFAULT_IMAGE")
        .or(file.default_image)
        .unwrap_or_else(|| "base".to_owned())
        .parse()
        .map_err(|e| bad("default_image", e))?;
    let guest_serves = file.guest.command.is_some();
    let guest_command =
        file.guest.command.unwrap_or_else(|| vec!["sleep".to_owned(), "infinity".to_owned()]);
    if guest_command.first().is_none_or(String::is_empty) {
        return Err(bad("guest.command", "must name a program"));
    }

    let accel = match var("AEGIS_ACCEL").as_deref() {
        None => file.machines.accel.unwrap_or_default(),
        Some("auto") => Accel::Auto,
        Some("kvm") => Accel::Kvm,
        Some("tcg") => Accel::Tcg,
        Some(other) => return Err(bad("AEGIS_ACCEL", format!("{other} is not auto, kvm or tcg"))),
    };
    let own_kernel = var("AEGIS_KERNEL").map(PathBuf::from).or(file.machines.kernel);
    let modules = match (&own_kernel, file.machines.modules) {
        (_, Some(modules)) => Some(modules),
        // A kernel of one's own has what it needs built in, unless modules are named too.
        (Some(_), None) => None,
        (None, None) => Some(home.join("kernel/modules")),
    };
    let spares = match var("AEGIS_SPARES") {
        None => file.machines.spares.unwrap_or(1),
        Some(word) => word.parse().unwrap_or(usize::MAX),
    };
    if spares > SPARES_MAX {
        return Err(bad("machines.spares", format!("must be from 0 to {SPARES_MAX}")));
    }
    let machines = Machines {
        programs: var("AEGIS_PROGRAMS")
            .map(PathBuf::from)
            .or(file.machines.programs)
            .unwrap_or_else(|| programs.to_owned()),
        qemu: var("AEGIS_QEMU")
            .map(PathBuf::from)
            .or(file.machines.qemu)
            .unwrap_or_else(|| PathBuf::from("/usr/bin/qemu-system-x86_64")),
        kernel: own_kernel.unwrap_or_else(|| home.join("kernel/vmlinux")),
        modules,
        accel,
        require_limits: file.machines.require_limits.unwrap_or(true),
        spares,
    };

    let log = match var("AEGIS_LOG_FORMAT").as_deref() {
        None => file.log.format.unwrap_or_default(),
        Some("text") => LogFormat::Text,
        Some("json") => LogFormat::Json,
        Some(other) => return Err(bad("AEGIS_LOG_FORMAT", format!("{other} is not text or json"))),
    };
    let log_filter = var("AEGIS_LOG").or(file.log.filter).unwrap_or_else(|| "info".to_owned());
    let ports = file.ports.range.unwrap_or((20_000, 29_999));
    if ports.0 == 0 || ports.0 > ports.1 {
        return Err(bad("ports.range", "must be [first, last], both from 1 to 65535"));
    }
    let disk_gb = file.capacity.disk_gb;
    if disk_gb.is_some_and(|gb| !(gb > 0.0 && gb <= 1e9)) {
        return Err(bad("capacity.disk_gb", "must be above 0"));
    }
    // Guests touch a part of what they may have: memory and disk are lent out more than once, and
    // the cgroup and the file's size stop each machine at its own limit.
    let memory_mb = file
        .capacity
        .memory_mb
        .unwrap_or_else(|| u32::try_from(host.memory_mb.saturating_mul(8)).unwrap_or(u32::MAX));
    let capacity = Capacity {
        machines: file.capacity.machines.unwrap_or(256),
        memory: MemoryMb(memory_mb),
        disk: DiskBytes(match disk_gb {
            Some(gb) => (gb * 1e9) as u64,
            None => host.disk_free.saturating_mul(50),
        }),
        vcpus: file.capacity.vcpus.unwrap_or_else(|| host.cpus.max(2)),
    };
    let kits = kits(file.kits).map_err(|e| bad("kits", e))?;
    let mut idle = Times::default();
    for (name, seconds, setting) in [
        ("idle.pause_after_secs", file.idle.pause_after_secs, &mut idle.pause_after),
        ("idle.suspend_after_secs", file.idle.suspend_after_secs, &mut idle.suspend_after),
    ] {
        let Some(seconds) = seconds else { continue };
        if !(1..=IDLE_SECS_MAX).contains(&seconds) {
            return Err(bad(name, format!("must be from 1 to {IDLE_SECS_MAX}")));
        }
        *setting = DurationMs(seconds * 1000);
    }
    Ok(Config {
        home,
        listen,
        no_auth,
        provisioner,
        default_image,
        guest_command,
        guest_serves,
        machines,
        capacity,
        idle,
        kits,
        resolvers: egress::resolvers(file.egress, host.resolvers)?,
        providers: hatch::providers(file.llm)?,
        host_services: hatch::services(file.host_services)?,
        tls_ca: file.secrets.tls_ca,
        images: images::images(file.images, env)?,
        vers,
        vers_api: file.vers_api.enabled,
        ports,
        by_name: by_name(file.router)?,
        ports_bind: file.ports.bind.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        rate_per_second: file.rate_limit.per_second.unwrap_or(50),
        rate_burst: file.rate_limit.burst.unwrap_or(200),
        log,
        log_filter,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        let resolvers = vec!["192.0.2.53:53".parse().unwrap()];
        Host { memory_mb: 8000, disk_free: 1_000_000_000_000, cpus: 2, resolvers }
    }

    fn with(flags: Flags, env: &[(&str, &str)], file: &str) -> Result<Config, BadConfig> {
        let mut vars: BTreeMap<String, String> =
            env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        vars.insert("HOME".to_owned(), "/home/x".to_owned());
        build(&flags, &vars, Some(file), Path::new("/opt/aegis"), host())
    }

    #[test]
    fn flags_win_over_env_over_file() {
        let file = "listen = '127.0.0.1:1'";
        let env = [("AEGIS_LISTEN", "127.0.0.1:2")];
        let flag = Flags { listen: Some("127.0.0.1:3".to_owned()), ..Flags::default() };
        let port = |c: Config| c.listen.port();
        assert_eq!(port(with(Flags::default(), &[], "").unwrap()), 3000);
        assert_eq!(port(with(Flags::default(), &[], file).unwrap()), 1);
        assert_eq!(port(with(Flags::default(), &env, file).unwrap()), 2);
        assert_eq!(port(with(flag, &env, file).unwrap()), 3);
        assert_eq!(with(Flags::default(), &[], "").unwrap().home, Path::new("/home/x/.aegis"));
    }

    #[test]
    fn the_log_is_set_by_env_over_file() {
        let file = "[log]\nformat = 'json'\nfilter = 'debug'";
        let log = |env: &[(&str, &str)], file: &str| {
            let config = with(Flags::default(), env, file).unwrap();
            (config.log, config.log_filter)
        };
        assert_eq!(log(&[], ""), (LogFormat::Text, "info".to_owned()));
        assert_eq!(log(&[], file), (LogFormat::Json, "debug".to_owned()));
        let env = [("AEGIS_LOG_FORMAT", "text"), ("AEGIS_LOG", "warn")];
        assert_eq!(log(&env, file), (LogFormat::Text, "warn".to_owned()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let no_auth =
            Flags { no_auth: true, listen: Some("0.0.0.0:3000".to_owned()), ..Flags::default() };
        assert_eq!(with(no_auth, &[], "").unwrap_err().setting, "no-auth");
        let none = Flags::default;
        assert_eq!(with(none(), &[], "listen = 'x'").unwrap_err().setting, "listen");
        assert_eq!(with(none(), &[], "surprise = 1").unwrap_err().setting, "aegis.toml");
        assert_eq!(
            with(none(), &[], "[ports]\nrange = [9, 3]").unwrap_err().setting,
            "ports.range"
        );
        assert_eq!(
            with(none(), &[("AEGIS_ACCEL", "hope")], "").unwrap_err().setting,
            "AEGIS_ACCEL"
        );
        let long = format!("/{}", "x".repeat(HOME_MAX));
        assert_eq!(with(none(), &[("AEGIS_HOME", &long)], "").unwrap_err().setting, "home");
        assert_eq!(with(none(), &[("AEGIS_HOME", "rel")], "").unwrap_err().setting, "home");
    }

    #[test]
    fn nobody_looks_into_tls_unless_it_is_said() {
        let tls_ca = |file: &str| with(Flags::default(), &[], file).map(|c| c.tls_ca);
        assert_eq!((tls_ca(""), tls_ca("[secrets]")), (Ok(false), Ok(false)));
        assert_eq!(tls_ca("[secrets]\ntls_ca = true"), Ok(true));
        assert_eq!(tls_ca("[secrets]\nca = true").unwrap_err().setting, "aegis.toml");
    }

    #[test]
    fn an_own_kernel_brings_its_own_modules() {
        let own = with(Flags::default(), &[], "[machines]\nkernel = '/k'").unwrap();
        assert_eq!(own.machines.modules, None);
        let ours = with(Flags::default(), &[], "").unwrap();
        assert!(ours.machines.modules.is_some());
    }

    #[test]
    fn kits_get_what_is_said_and_little_when_nothing_is() {
        let kits = |file: &str| with(Flags::default(), &[], file).unwrap().kits;
        let usual = kits("");
        assert_eq!((usual.spawn_depth, usual.max_children, usual.max_memory.0), (1, 5, 2048));
        assert!(usual.allowed_secrets.is_empty() && usual.allowed_workspaces.is_empty());
        let none = kits("[kits]\nspawn = false\nallowed_images = []\nmax_children = 0");
        assert!(!none.spawn && none.allowed_images.is_empty());
        assert_eq!(none.max_children, 0);
        assert_eq!(
            with(Flags::default(), &[], "[kits]\nallowed_images = ['']").unwrap_err().setting,
            "kits"
        );
    }
}
