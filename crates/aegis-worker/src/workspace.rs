//! The machine's workspace: a process that serves one folder and nothing else, and the messages
//! between it and the machine. What they say, nobody here looks at.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use aegis_wire::bounds::{
    WORKSPACE_MESSAGE_MAX, WORKSPACE_UNHEARD_BYTES_MAX, WORKSPACE_UNHEARD_MAX,
};
use aegis_wire::channel::StreamHead;
use aegis_wire::channel::frame::{Epoch, PADDING};
use aegis_wire::channel::workspace::{HELLO_LEN, Inbox, Link, Resume, put};
use aegis_wire::words::DiskBytes;
use aegis_wire::worker::{Lend, workspace_book};
use aegis_workspace::Terms;
use anyhow::Context as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::child::Child;
use crate::life::{Books, lock};
use crate::relay::{self, Relay, Session};
use crate::snapshot;
use crate::sys::{self, Confine};

/// Servers that a machine may wear out.
const SERVERS_MAX: usize = 5;

/// Bytes that are read or written at a time.
const CHUNK: usize = 64 * 1024;

/// A folder that is lent.
pub struct Workspace {
    folder: OwnedFd,
    read_only: bool,
    books: Arc<Books>,
    // The machine's own, and how large that may be.
    disk: File,
    limit: DiskBytes,
    // The first of its servers.
    server: Option<Server>,
}

/// A process that serves it.
struct Server {
    child: Child,
    name: String,
    account: Arc<Account>,
    // To it and from it, as long as this is here.
    _tasks: JoinSet<()>,
}

/// What was said between the machine and one server.
#[derive(Default)]
struct Account {
    books: Mutex<Both>,
    // There is something to say, or to do, or room for more.
    news: Notify,
}

#[derive(Default)]
struct Both {
    link: Link,
    // Requests of this session that the server was not given yet, whole. They have not come: a session
    // that is lost takes them along, and the machine sends them again in the next one.
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
}

impl Both {
    /// A machine that waits for the server has no more on its way than that; whoever has read so much
    /// more breaks the protocol.
    fn put(&mut self, request: Vec<u8>) -> anyhow::Result<()> {
        self.waiting_bytes += request.len();
        self.waiting.push_back(request);
        anyhow::ensure!(
            self.waiting.len() <= 2 * WORKSPACE_UNHEARD_MAX
                && self.waiting_bytes <= WORKSPACE_UNHEARD_BYTES_MAX,
            "the machine asks more at a time than it may"
        );
        Ok(())
    }

    /// The next one; from here on it has come.
    fn take(&mut self) -> Option<Vec<u8>> {
        let next = self.waiting.pop_front()?;
        self.waiting_bytes -= next.len();
        self.link.came();
        Some(next)
    }

    /// Begins a session; gives how many came until now.
    fn begin(&mut self) -> u64 {
        self.waiting.clear();
        self.waiting_bytes = 0;
        self.link.heard()
    }
}

impl Workspace {
    /// Opens the folder, and starts its server. From here on it is that one, whatever its path leads
    /// to later. Must be called on the main thread.
    pub fn open(
        lend: &Lend,
        books: Arc<Books>,
        disk: File,
        limit: DiskBytes,
    ) -> anyhow::Result<Workspace> {
        let folder = aegis_workspace::open(&lend.path)
            .with_context(|| format!("its workspace {}", lend.path.display()))?;
        let read_only = lend.read_only;
        let mut workspace = Workspace { folder, read_only, books, disk, limit, server: None };
        workspace.server = Some(workspace.start()?);
        Ok(workspace)
    }

    /// Serves it to a machine, for as long as that lives. Must be called on the main thread.
    pub async fn serve(mut self, relay: Relay) {
        for _ in 0..SERVERS_MAX {
            let mut server = match self.server.take().map_or_else(|| self.start(), Ok) {
                Ok(server) => server,
                Err(error) => {
                    tracing::error!(error = format!("{error:#}"), "no workspace");
                    return;
                }
            };
            let death = server.child.death();
            tokio::select! {
                () = server.speak(&relay) => return,
                () = death.happened() => {}
            }
            let words = server.child.last_words();
            let ended = server.child.wait().await;
            tracing::warn!(?ended, words, "the workspace's server ended");
        }
        tracing::error!("the workspace's server ended too often: none any more");
    }

    fn start(&self) -> anyhow::Result<Server> {
        let record = self.books.record();
        let disk = self.disk.try_clone()?;
        let book = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(workspace_book(&record.disk))
            .context("the workspace's count")?;
        let terms = Terms {
            read_only: self.read_only,
            limit_bytes: self.limit.0,
            memory_bytes: record.memory_bytes,
            disk: disk.as_raw_fd(),
            book: book.as_raw_fd(),
        };
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("aegis-worker").arg("workspace").arg(serde_json::to_string(&terms)?);
        command.stdin(Stdio::from(OwnedFd::from(theirs)));
        command.stdout(Stdio::from(self.folder.try_clone()?)).stderr(Stdio::piped());
        let plan = Confine {
            join: record.group.doors()?,
            keep: vec![disk.into(), book.into()],
            die_with_parent: true,
            ..Confine::default()
        };
        sys::confine(&mut command, plan);
        let child = Child::spawn_as_is(command).context("can't start the workspace's server")?;
        let mut name = [0; 8];
        relay::random(&mut name)?;
        let account = Arc::new(Account::default());
        let (answers, asks) = tokio::io::split(UnixStream::from_std(ours)?);
        let mut tasks = JoinSet::new();
        tasks.spawn(ask(asks, Arc::clone(&account)));
        tasks.spawn(take(answers, Arc::clone(&account)));
        Ok(Server { child, name: snapshot::hex(&name), account, _tasks: tasks })
    }
}

impl Account {
    /// Waits until something can be had of it.
    async fn until<T>(&self, mut have: impl FnMut(&mut Both) -> Option<T>) -> T {
        loop {
            let mut news = std::pin::pin!(self.news.notified());
            // From here on none is missed.
            news.as_mut().enable();
            if let Some(had) = have(&mut lock(&self.books)) {
                return had;
            }
            news.await;
        }
    }
}

/// Passes requests on, each whole, whatever becomes of the session that it came in. Nobody else waits
/// for the server: what it says could not be heard meanwhile, and it would wait for that.
async fn ask(mut to: impl AsyncWrite + Unpin, account: Arc<Account>) {
    loop {
        let request = account.until(Both::take).await;
        account.news.notify_waiters();
        if to.write_all(&request).await.is_err() {
            return;
        }
    }
}

/// Takes answers and news as there is room for them.
async fn take(mut from: impl AsyncRead + Unpin, account: Arc<Account>) {
    while let Ok(answer) = read_answer(&mut from).await {
        account.until(|both| both.link.has_room().then_some(())).await;
        lock(&account.books).link.say(answer.into());
        account.news.notify_waiters();
    }
}

async fn read_answer(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut len = [0; 4];
    from.read_exact(&mut len).await?;
    let whole = u32::from_le_bytes(len) as usize;
    if !(len.len()..=WORKSPACE_MESSAGE_MAX).contains(&whole) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut answer = vec![0; whole];
    answer[..len.len()].copy_from_slice(&len);
    from.read_exact(&mut answer[len.len()..]).await?;
    Ok(answer)
}

impl Server {
    /// Speaks with the machine while one session of its channel after the other lives; ends with the
    /// channel.
    async fn speak(&self, relay: &Relay) {
        while let Ok(session) = relay.session().await {
            if let Err(error) = self.carry(&session).await {
                tracing::debug!(error = format!("{error:#}"), "the workspace's messages ended");
            }
            // A machine that gives its mount up gets no other one in this session.
            session.mux.closed().await;
            // Its successor is announced by another task.
            tokio::task::yield_now().await;
        }
    }

    async fn carry(&self, session: &Session) -> anyhow::Result<()> {
        let epoch = relay::new_epoch()?;
        let heard = lock(&self.account.books).begin();
        let head = StreamHead::Workspace(Resume { server: self.name.clone(), heard, epoch });
        let mut stream = relay::open_stream(&session.mux, &head, &[]).await?;
        let mut hello = [0; HELLO_LEN];
        stream.read_exact(&mut hello).await?;
        lock(&self.account.books).link.resume(u64::from_le_bytes(hello))?;
        self.account.news.notify_waiters();
        let port = &*session.workspace;
        tokio::select! {
            heard = self.hear(port, epoch) => heard,
            said = self.say(port, epoch) => said,
            // Nothing comes over it but its end.
            ended = stream.read_u8() => Err(ended.err().map_or_else(
                || anyhow::anyhow!("the machine says more than it may"),
                Into::into,
            )),
        }
    }

    /// Machine → server.
    async fn hear(&self, port: &UnixStream, epoch: Epoch) -> anyhow::Result<()> {
        let (mut inbox, mut chunk) = (Inbox::default(), vec![0; CHUNK]);
        inbox.begin(epoch);
        loop {
            while let Some((head, message)) = inbox.next_message()? {
                {
                    let mut both = lock(&self.account.books);
                    both.link.other_heard(head.heard)?;
                    if head.len > 0 {
                        both.put(message)?;
                    }
                }
                self.account.news.notify_waiters();
                // A machine that never stops talking must not keep this process from all else.
                tokio::task::consume_budget().await;
            }
            tokio::task::consume_budget().await;
            port.readable().await?;
            match port.try_read(&mut chunk) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => inbox.feed(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Server → machine.
    async fn say(&self, port: &UnixStream, epoch: Epoch) -> anyhow::Result<()> {
        // Completes whatever was cut off before.
        let mut out = vec![0xFF; PADDING];
        loop {
            let first = self.account.until(|both| both.link.next_out()).await;
            put(&mut out, epoch, &first);
            while out.len() < CHUNK
                && let Some(next) = lock(&self.account.books).link.next_out()
            {
                put(&mut out, epoch, &next);
            }
            let mut rest = &out[..];
            while !rest.is_empty() {
                port.writable().await?;
                match port.try_write(rest) {
                    Ok(n) => rest = &rest[n..],
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e.into()),
                }
            }
            out.clear();
        }
    }
}
