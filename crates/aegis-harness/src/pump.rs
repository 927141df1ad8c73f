//! Carries the workspace's messages between this kernel and the host, over a port of their own.
//!
//! One thread, and as little in it as can be: whoever asks for a file waits until this process was
//! switched to, twice; where the machine is emulated, each page of code that is touched on the way is
//! translated again. News of the host's changes have another thread, because the kernel may have
//! those wait for an answer.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aegis_wire::bounds::{WORKSPACE_IN_FLIGHT_MAX, WORKSPACE_MESSAGE_MAX};
use aegis_wire::channel::frame::Epoch;
use aegis_wire::channel::workspace::{Inbox, Link, LinkError, MOUNT, put};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use tokio::sync::Notify;

use crate::hands::Hands;
use crate::note::note;

/// Bytes of requests that wait here for the host; more wait with the kernel.
const WAITING_MAX: usize = 2 << 20;
/// Bytes that are read of the port, or prepared for it, at a time.
const CHUNK: usize = 64 * 1024;
/// How soon a host that went away is looked for again.
const AWAY: Duration = Duration::from_millis(20);
/// How often the port is looked at before this thread sleeps.
const LOOKS: usize = 100;
/// Bytes of the kernel's own head of a request, and of an answer.
pub const KERNEL_HEAD: usize = 40;
const ANSWER_HEAD: usize = 16;
/// Requests that nobody answers: FORGET, INTERRUPT, BATCH_FORGET.
const UNANSWERED: [u32; 3] = [FORGET, 36, 42];
const FORGET: u32 = 2;
/// So many files that the kernel forgets are told of at once, …
const FORGOTTEN_MAX: usize = 32;
/// … or after this long.
const FORGOTTEN_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// Files of the host are no devices: the answer to IOCTL, of which many programs ask whether what
/// they opened is a terminal, is always the same.
const IOCTL: u32 = 39;

/// What this kernel and its mount are reached by.
#[derive(Clone)]
pub struct Mount {
    /// Requests and answers.
    pub fuse: Arc<OwnedFd>,
    /// The same, for news alone; without it none are taken.
    pub news: Option<Arc<OwnedFd>>,
}

/// The thread, and what it shares with those who tell it what to do.
pub struct Pump {
    state: Mutex<State>,
    // There is something new in the state.
    wake: OwnedFd,
    // The thread let go of a mount, or found that it is gone.
    changed: Notify,
    news: News,
}

#[derive(Default)]
struct State {
    mount: Option<Mount>,
    account: Account,
    // While there is a session.
    epoch: Option<Epoch>,
}

/// What one server of the host knows of.
#[derive(Default)]
struct Account {
    link: Link,
    // Requests that the kernel waits for.
    open: usize,
    // What was said last is nothing but so many files that the kernel forgets.
    forgotten: usize,
}

/// News that the kernel was not told yet, each once.
#[derive(Default)]
struct News {
    queue: Mutex<Queue>,
    more: Condvar,
}

#[derive(Default)]
struct Queue {
    // No more than the kernel knows files and names: it was told of each.
    waiting: VecDeque<(Arc<OwnedFd>, Vec<u8>)>,
    known: HashSet<Vec<u8>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pump {
    /// Starts the threads, on a port that never blocks.
    pub fn start(port: File) -> io::Result<Arc<Pump>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (state, changed, news) = (Mutex::default(), Notify::new(), News::default());
        let pump = Arc::new(Pump { state, wake, changed, news });
        let [messages, news] = [Arc::clone(&pump), Arc::clone(&pump)];
        let named = |name: &str| std::thread::Builder::new().name(name.to_owned());
        named("workspace").spawn(move || messages.carry(&port))?;
        named("news").spawn(move || news.news.tell())?;
        Ok(pump)
    }

    fn wake(&self) {
        // Full means that it is awake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// From here on that mount is carried; `first` is said before all else.
    pub fn serve(&self, mount: Mount, first: Vec<u8>) {
        let mut state = lock(&self.state);
        *state = State { mount: Some(mount), ..State::default() };
        state.account.link.say(first.into());
    }

    /// Begins a session; tells how many messages came until now.
    pub fn begin(&self, epoch: Epoch, heard: u64) -> Result<u64, LinkError> {
        let mut state = lock(&self.state);
        state.account.link.resume(heard)?;
        state.epoch = Some(epoch);
        self.wake();
        Ok(state.account.link.heard())
    }

    /// The session is over.
    pub fn end(&self) {
        lock(&self.state).epoch = None;
        self.wake();
    }

    /// Lets go of the mount: who waits for an answer gets an error.
    pub async fn let_go(&self, hands: &Hands) {
        let Some(mount) = std::mem::take(&mut *lock(&self.state)).mount else { return };
        self.wake();
        self.news.forget();
        // To close it is not enough while the other thread tells it news, which may wait for an answer
        // too. This ends all of them, whether or not it can be unmounted now.
        let _ = hands.run(|| unmount(MOUNT, UnmountFlags::FORCE)).await;
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if Arc::strong_count(&mount.fuse) == 1 {
                return;
            }
            changed.await;
        }
    }

    /// Completes when the kernel has no such mount any more.
    pub async fn unmounted(&self) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if lock(&self.state).mount.is_none() {
                return;
            }
            changed.await;
        }
    }

    fn carry(&self, port: &File) {
        let (mut inbox, mut epoch, mut hurry) = (Inbox::default(), None, false);
        let mut mount: Option<Mount> = None;
        let (mut out, mut sent) = (Vec::with_capacity(CHUNK), 0);
        let mut buffer = vec![0; WORKSPACE_MESSAGE_MAX];
        loop {
            let (room, waits, forgotten) = {
                let mut state = lock(&self.state);
                if epoch != state.epoch {
                    epoch = state.epoch;
                    // Half a frame would swallow the next one: its end goes out, and all behind it.
                    if sent == 0 {
                        out.clear();
                    }
                }
                let fuse = state.mount.as_ref().map(|m| Arc::as_ptr(&m.fuse));
                if mount.as_ref().map(|m| Arc::as_ptr(&m.fuse)) != fuse {
                    mount.clone_from(&state.mount);
                    self.changed.notify_waiters();
                }
                hurry |= state.account.forgotten == 0 || state.account.forgotten >= FORGOTTEN_MAX;
                if let Some(epoch) = epoch.filter(|_| hurry) {
                    while out.len() < CHUNK
                        && let Some(next) = state.account.link.next_out()
                    {
                        put(&mut out, epoch, &next);
                    }
                    (state.account.forgotten, hurry) = (0, false);
                }
                let account = &state.account;
                (account.has_room(), epoch.is_some() && account.open > 0, account.forgotten > 0)
            };
            while sent < out.len() {
                match rustix::io::write(port, &out[sent..]) {
                    Ok(n) => sent += n,
                    Err(Errno::INTR) => {}
                    // The port has no room, or there is no host: it will be told again.
                    Err(_) => break,
                }
            }
            if sent == out.len() {
                out.clear();
                sent = 0;
            }
            if waits && self.look(port, &mut buffer, &mut inbox) {
                continue;
            }
            let mut fds = Vec::with_capacity(3);
            fds.push(PollFd::new(&self.wake, PollFlags::IN));
            if epoch.is_some() {
                let backlog = if out.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
                fds.push(PollFd::new(port, PollFlags::IN | backlog));
                if let Some(mount) = mount.as_ref().filter(|_| room) {
                    fds.push(PollFd::new(&*mount.fuse, PollFlags::IN));
                }
            }
            let wait = Some(&FORGOTTEN_WAIT).filter(|_| forgotten);
            match poll(&mut fds, wait) {
                Ok(0) => hurry = true,
                Ok(_) => {}
                Err(_) => continue,
            }
            let mut seen = [false; 3];
            seen.iter_mut().zip(&fds).for_each(|(seen, fd)| *seen = !fd.revents().is_empty());
            let hangs_up = fds.get(1).is_some_and(|fd| fd.revents().contains(PollFlags::HUP));
            drop(fds);
            if seen[0] {
                let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            }
            if seen[1] {
                // A host that is away is told of all the time.
                if !self.take(port, &mut buffer, &mut inbox) && hangs_up {
                    std::thread::sleep(AWAY);
                }
            }
            if seen[2]
                && let Some(mount) = &mount
            {
                self.ask(&mount.fuse, &mut buffer);
            }
        }
    }

    /// Looks a few times for an answer that comes soon: to sleep and to be woken takes longer.
    fn look(&self, port: &File, buffer: &mut [u8], inbox: &mut Inbox) -> bool {
        (0..LOOKS).any(|_| self.take(port, buffer, inbox))
    }

    /// Takes what the port has; tells whether there was anything.
    fn take(&self, port: &File, buffer: &mut [u8], inbox: &mut Inbox) -> bool {
        let came = match rustix::io::read(port, &mut buffer[..CHUNK]) {
            Ok(0) | Err(_) => return false,
            Ok(n) => &buffer[..n],
        };
        // Only now: a session may have begun since this thread looked, and this be its first words.
        let epoch = lock(&self.state).epoch;
        inbox.begin(epoch.unwrap_or_default());
        inbox.feed(came);
        if let Err(error) = self.hear(inbox, epoch) {
            note(&format!("workspace: {error}"));
            let mut state = lock(&self.state);
            // Another session may have begun.
            if state.epoch == epoch {
                state.epoch = None;
            }
        }
        true
    }

    /// Host → kernel.
    fn hear(&self, inbox: &mut Inbox, epoch: Option<Epoch>) -> Result<(), LinkError> {
        while let Some((head, message)) = inbox.next_message()? {
            let mut state = lock(&self.state);
            // It will come again in the session that began meanwhile.
            if state.epoch != epoch {
                return Ok(());
            }
            let Some(mount) = state.mount.clone() else { continue };
            state.account.link.other_heard(head.heard)?;
            if head.len == 0 {
                continue;
            }
            state.account.link.came();
            if is_news(&message) {
                drop(state);
                if let Some(news) = &mount.news {
                    self.news.add(news, message);
                }
                continue;
            }
            state.account.open = state.account.open.saturating_sub(1);
            drop(state);
            // Who asked may have been killed meanwhile; then nobody waits for it.
            let _ = rustix::io::write(&mount.fuse, &message);
        }
        Ok(())
    }

    /// Kernel → what is said.
    fn ask(&self, fuse: &Arc<OwnedFd>, buffer: &mut [u8]) {
        match rustix::io::read(fuse, &mut *buffer) {
            Ok(len) if opcode(&buffer[..len]) == Some(IOCTL) => {
                let _ = rustix::io::write(fuse, &refusal(&buffer[..len], Errno::NOTTY));
            }
            Ok(len) => lock(&self.state).account.ask(&buffer[..len]),
            // Taken back before it was read.
            Err(Errno::AGAIN | Errno::INTR | Errno::NOENT) => {}
            Err(_) => {
                let mut state = lock(&self.state);
                // Another one may be there already.
                if state.mount.as_ref().is_some_and(|m| Arc::ptr_eq(&m.fuse, fuse)) {
                    state.mount = None;
                }
            }
        }
    }
}

impl Account {
    fn has_room(&self) -> bool {
        self.open < WORKSPACE_IN_FLIGHT_MAX
            && self.link.has_room()
            && self.link.unheard_bytes() < WAITING_MAX
    }

    fn ask(&mut self, message: &[u8]) {
        let opcode = opcode(message);
        self.open += usize::from(opcode.is_some_and(|o| !UNANSWERED.contains(&o)));
        // Nobody waits for these, but they must not wait for ever.
        let alone = self.forgotten > 0 || self.link.all_out();
        self.forgotten = if opcode == Some(FORGET) && alone { self.forgotten + 1 } else { 0 };
        self.link.say(message.into());
    }
}

impl News {
    fn forget(&self) {
        *lock(&self.queue) = Queue::default();
    }

    fn add(&self, to: &Arc<OwnedFd>, message: Vec<u8>) {
        let mut queue = lock(&self.queue);
        if queue.known.insert(message.clone()) {
            queue.waiting.push_back((Arc::clone(to), message));
            self.more.notify_one();
        }
    }

    fn tell(&self) {
        loop {
            let (to, message) = {
                let mut queue = lock(&self.queue);
                loop {
                    if let Some(next) = queue.waiting.pop_front() {
                        queue.known.remove(&next.1);
                        break next;
                    }
                    queue = self.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
            };
            // What the kernel does not know any more needs no news.
            let _ = rustix::io::write(&to, &message);
        }
    }
}

/// What a request asks for.
fn opcode(request: &[u8]) -> Option<u32> {
    let bytes = request.get(4..8).filter(|_| request.len() >= KERNEL_HEAD)?;
    bytes.try_into().ok().map(u32::from_le_bytes)
}

/// Whether a message of the host answers nothing.
fn is_news(message: &[u8]) -> bool {
    message.get(8..ANSWER_HEAD).is_some_and(|unique| unique == [0; 8])
}

fn refusal(request: &[u8], errno: Errno) -> [u8; ANSWER_HEAD] {
    let mut answer = [0; ANSWER_HEAD];
    answer[..4].copy_from_slice(&(ANSWER_HEAD as u32).to_le_bytes());
    answer[4..8].copy_from_slice(&(-errno.raw_os_error()).to_le_bytes());
    answer[8..].copy_from_slice(&request[8..ANSWER_HEAD]);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(opcode: u32) -> Vec<u8> {
        let mut message = vec![0; KERNEL_HEAD];
        message[4..8].copy_from_slice(&opcode.to_le_bytes());
        message[8] = 9;
        message
    }

    #[test]
    fn no_more_is_asked_than_is_answered() {
        let mut account = Account::default();
        // What nobody answers does not count.
        account.ask(&message(UNANSWERED[0]));
        for _ in 0..WORKSPACE_IN_FLIGHT_MAX {
            assert!(account.has_room());
            account.ask(&message(1));
        }
        assert!(!account.has_room());
    }

    #[test]
    fn a_refusal_names_its_request() {
        let answer = refusal(&message(IOCTL), Errno::NOTTY);
        assert_eq!(answer[..4], [16, 0, 0, 0]);
        assert_eq!(i32::from_le_bytes(answer[4..8].try_into().unwrap()), -25);
        assert_eq!(answer[8..], [9, 0, 0, 0, 0, 0, 0, 0]);
        assert!(!is_news(&answer) && is_news(&[0; 16]) && !is_news(&[0; 15]));
    }
}
