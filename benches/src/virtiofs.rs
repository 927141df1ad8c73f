//! The same folder by virtiofs, for comparison: a bare QEMU without any of our programs, the same base
//! image, processor, memory and client.
//!
//! virtiofs can be had neither with copies of a golden machine nor with sleep, and the kernel of
//! machines has no module for it. So the kernel comes from elsewhere: `AEGIS_BENCH_VIRTIOFS` names a
//! directory with `vmlinuz` and all that is needed of its modules in `modules/` (Debian's
//! `linux-image-amd64`, unpacked: virtio_ring, virtio, virtio_mmio, virtio_blk, virtio_console, fuse,
//! virtiofs, libcrc32c, erofs, overlay, crc16, crc32c_generic, mbcache, jbd2, ext4). virtiofsd, mke2fs
//! and a static busybox are the host's.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// Directory of kernel and modules.
const GIVEN: &str = "AEGIS_BENCH_VIRTIOFS";
/// Where distributions put it.
const DAEMONS: [&str; 3] =
    ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"];
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const MEMORY: &str = "512M";
/// A machine that hangs, hangs for ever.
const DEADLINE: Duration = Duration::from_secs(150);
/// Seldom enough to take no time from it.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// First process of the machine. `%` is what the client is told.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev; $b mount -t proc proc /proc; $b mount -t sysfs sys /sys
for turn in 1 2 3 4 5 6; do for m in /modules/*.ko; do $b insmod $m 2>/dev/null; done; done
until [ -e /dev/vda ] && [ -e /dev/vdb ] && $b ls /dev/vport* >/dev/null 2>&1; do $b usleep 10000; done
out=$($b ls /dev/vport*)
for d in vda vdb; do [ $($b cat /sys/block/$d/ro) = 1 ] && base=$d || disk=$d; done
{
  $b mount -t erofs -o ro /dev/$base /base && $b mount -t ext4 /dev/$disk /disk &&
  $b mkdir -p /disk/up /disk/work &&
  $b mount -t overlay -o lowerdir=/base,upperdir=/disk/up,workdir=/disk/work root /new &&
  $b mkdir -p /new/workspace && $b mount -t virtiofs ws /new/workspace &&
  for d in dev proc sys; do $b mount -o bind /$d /new/$d || exit 1; done &&
  $b chroot /new /usr/bin/python3 /workspace/client.py %
  echo ended: $?
} > $out 2>&1
$b sleep 1000000
"#;

/// What the host has for it.
struct Found {
    kernel: PathBuf,
    modules: PathBuf,
    daemon: PathBuf,
    busybox: PathBuf,
    base: PathBuf,
}

/// A process that ends with its owner.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the client says in such a machine.
///
/// # Errors
/// What the host lacks, or what failed.
pub fn said(client: &str, arguments: &str) -> anyhow::Result<String> {
    let found = find()?;
    let dir = tempfile::Builder::new().prefix("aegis-bench-").tempdir_in("/tmp")?;
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("lent"))?;
    std::fs::write(at("lent/client.py"), client)?;
    File::create(at("disk"))?.set_len(2_000_000_000)?;
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-F"]).arg(at("disk")))?;
    initramfs(&found, dir.path(), arguments)?;
    let _daemon = daemon(&found.daemon, &at("lent"), &at("socket"))?;
    let mut machine = machine(&found, dir.path())?;
    let began = Instant::now();
    loop {
        let said = std::fs::read_to_string(at("said")).unwrap_or_default();
        match said.split_once("ended: ") {
            Some((said, "0\n")) => return Ok(said.to_owned()),
            Some((_, status)) if status.ends_with('\n') => anyhow::bail!("it failed: {said}"),
            _ => {}
        }
        let gone = machine.0.try_wait()?.is_some() || began.elapsed() > DEADLINE;
        anyhow::ensure!(!gone, "its machine did not do it: {said}");
        std::thread::sleep(LOOK_EVERY);
    }
}

fn find() -> anyhow::Result<Found> {
    let given = std::env::var_os(GIVEN).map(PathBuf::from);
    let given = given.with_context(|| format!("{GIVEN} names no kernel that has it"))?;
    let on_path = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.exists())
    };
    let daemon = DAEMONS.iter().map(PathBuf::from).find(|file| file.exists());
    let found = Found {
        kernel: given.join("vmlinuz"),
        modules: given.join("modules"),
        daemon: daemon.or_else(|| on_path("virtiofsd")).context("no virtiofsd is installed")?,
        busybox: on_path("busybox").context("no busybox is installed")?,
        base: aegis_tests::assets().join("images/base/base.erofs"),
    };
    on_path("mke2fs").context("no mke2fs is installed")?;
    for file in [&found.kernel, &found.modules.join("virtiofs.ko"), &found.base, Path::new(QEMU)] {
        anyhow::ensure!(file.exists(), "{} is not there", file.display());
    }
    Ok(found)
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let out = command.output().with_context(|| format!("{command:?}"))?;
    let words = String::from_utf8_lossy(&out.stderr);
    anyhow::ensure!(out.status.success(), "{command:?}: {words}");
    Ok(())
}

fn initramfs(found: &Found, dir: &Path, arguments: &str) -> anyhow::Result<()> {
    let tree = dir.join("tree");
    for name in ["bin", "dev", "proc", "sys", "modules", "base", "disk", "new"] {
        std::fs::create_dir_all(tree.join(name))?;
    }
    std::fs::copy(&found.busybox, tree.join("bin/busybox"))?;
    std::fs::write(tree.join("init"), INIT.replace('%', arguments))?;
    std::fs::set_permissions(
        tree.join("init"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    for module in std::fs::read_dir(&found.modules)?.flatten() {
        std::fs::copy(module.path(), tree.join("modules").join(module.file_name()))?;
    }
    let pack = "cd \"$1\" && find . | \"$2\" cpio -o -H newc > ../initrd";
    run(Command::new("sh").args(["-c", pack, "pack"]).arg(&tree).arg(&found.busybox))
}

/// Both daemons that there are, by their own words and with what they do by themselves.
fn daemon(program: &Path, folder: &Path, socket: &Path) -> anyhow::Result<Ends> {
    let help = Command::new(program).arg("--help").output()?;
    let mut command = Command::new(program);
    command.arg(format!("--socket-path={}", socket.display()));
    match String::from_utf8_lossy(&[help.stdout, help.stderr].concat()).contains("--shared-dir") {
        true => command.arg("--shared-dir").arg(folder),
        false => command.arg("-o").arg(format!("source={}", folder.display())),
    };
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let daemon = Ends(command.spawn()?);
    aegis_tests::wait_until("virtiofsd listens", Duration::from_secs(10), || socket.exists());
    Ok(daemon)
}

/// As machines of ours are run, but for the device and the memory that it needs.
fn machine(found: &Found, dir: &Path) -> anyhow::Result<Ends> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
    let virtualizes = cpu.split_whitespace().any(|word| word == "vmx" || word == "svm");
    let kvm = virtualizes && File::options().write(true).open("/dev/kvm").is_ok();
    let mut line = "quiet no_timer_check noreplace-smp init_on_alloc=0 nokaslr cryptomgr.notests \
                    audit=0 apparmor=0 panic=-1"
        .to_owned();
    let mut command = Command::new(QEMU);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    if kvm {
        command.args(["-accel", "kvm", "-cpu", "host"]);
    } else {
        command.args(["-accel", "tcg,tb-size=64", "-cpu", "max,-erms,-fsrm,-smap"]);
        let mhz = cpu.lines().find_map(|l| l.strip_prefix("cpu MHz")?.split(": ").nth(1));
        let mhz: f64 = mhz.and_then(|mhz| mhz.parse().ok()).context("the processor's rate")?;
        line.push_str(&format!(" mitigations=off tsc=reliable tsc_early_khz={:.0}", mhz * 1e3));
    }
    let path = |name: &str| dir.join(name).display().to_string();
    command.args([
        "-smp",
        "1",
        "-m",
        MEMORY,
        "-M",
        "microvm,acpi=on,isa-serial=off,memory-backend=m0",
    ]);
    command.args(["-object", &format!("memory-backend-memfd,id=m0,size={MEMORY},share=on")]);
    command.args(["-global", "virtio-mmio.force-legacy=false"]);
    command.args(["-chardev", &format!("socket,id=fs,path={}", path("socket"))]);
    command.args(["-device", "vhost-user-fs-device,chardev=fs,tag=ws,queue-size=256"]);
    command.args(["-chardev", &format!("file,id=out,path={}", path("said"))]);
    command.args(["-device", "virtio-serial-device", "-device", "virtserialport,chardev=out"]);
    let base = format!(
        "driver=raw,node-name=b0,read-only=on,file.driver=file,file.filename={}",
        found.base.display()
    );
    command.args(["-blockdev", &base, "-device", "virtio-blk-device,drive=b0"]);
    let disk = format!(
        "driver=raw,node-name=b1,discard=unmap,detect-zeroes=unmap,file.driver=file,file.filename={}",
        path("disk")
    );
    command.args(["-blockdev", &disk, "-device", "virtio-blk-device,drive=b1"]);
    command.arg("-kernel").arg(&found.kernel).args(["-initrd", &path("initrd"), "-append", &line]);
    command.stdin(Stdio::null());
    Ok(Ends(command.spawn()?))
}
