//! Pseudo terminals, from a directory of devices that user code can't take away or replace.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use aegis_wire::channel::WindowSize;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{InputModes, OptionalActions, Winsize};

/// Where the kernel makes them.
const DEVICES: &str = "/dev/pts";

/// Makes pseudo terminals. Cheap to clone.
#[derive(Clone)]
pub struct Maker(Arc<OwnedFd>);

impl Maker {
    /// With the devices of now: the path inside is the user's to break.
    pub fn find() -> io::Result<Maker> {
        Ok(Maker(Arc::new(File::open(DEVICES)?.into())))
    }

    /// The host's side, which does not block, and the program's side.
    pub fn make(&self, size: WindowSize) -> io::Result<(OwnedFd, OwnedFd)> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        // Something mounted over it, a pipe that nobody writes to, say, is refused, not waited for.
        let here = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let master = rustix::fs::openat2(&*self.0, "ptmx", flags, Mode::empty(), here)?;
        rustix::pty::unlockpt(&master)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        // Erasing takes a whole letter: every machine speaks UTF-8.
        let mut modes = rustix::termios::tcgetattr(&slave)?;
        modes.input_modes |= InputModes::IUTF8;
        rustix::termios::tcsetattr(&slave, OptionalActions::Now, &modes)?;
        resize(&master, size)?;
        Ok((master, slave))
    }
}

/// Says how large the window is; the foreground hears of a change (SIGWINCH).
pub fn resize(master: impl AsFd, size: WindowSize) -> io::Result<()> {
    let (ws_row, ws_col) = (size.rows(), size.cols());
    let size = Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(master, size)?)
}
