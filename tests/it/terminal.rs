//! Commands at a terminal (contracts/aegis.md 1): the real program at a real terminal, and clients of
//! its WebSocket that mean no good.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use aegis_tests::house::{House, SERVING};
use aegis_tests::wait_until;
use futures_util::{SinkExt as _, StreamExt as _};
use rustix::process::{Pid, Signal};
use rustix::pty::OpenptFlags;
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error, Message};

/// Whatever is waited for comes within this, or never.
const DEADLINE: Duration = Duration::from_secs(60);

/// A terminal, and what it shows.
pub struct Screen {
    master: Arc<OwnedFd>,
    slave: OwnedFd,
    shown: Arc<(Mutex<Vec<u8>>, Condvar)>,
}

impl Screen {
    pub fn new(rows: u16, cols: u16) -> Screen {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
        let screen = Screen { master: Arc::new(master), slave, shown: Arc::default() };
        screen.resize(rows, cols);
        let (from, shown) = (Arc::clone(&screen.master), Arc::clone(&screen.shown));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Fails once nobody holds the other side.
            while let Ok(n @ 1..) = rustix::io::read(&*from, &mut buffer) {
                shown.0.lock().unwrap().extend_from_slice(&buffer[..n]);
                shown.1.notify_all();
            }
        });
        screen
    }

    fn resize(&self, ws_row: u16, ws_col: u16) {
        let size = Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&*self.master, size).unwrap();
    }

    pub fn typed(&self, keys: &str) {
        let mut to = std::fs::File::from(self.master.try_clone().unwrap());
        to.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until this is shown, and forgets all up to its end.
    #[track_caller]
    pub fn shows(&self, what: &str) {
        let find = |shown: &[u8]| shown.windows(what.len()).position(|w| w == what.as_bytes());
        let shown = self.shown.0.lock().unwrap();
        let waited = self.shown.1.wait_timeout_while(shown, DEADLINE, |s| find(s).is_none());
        let mut shown = waited.unwrap().0;
        let at = find(&shown).unwrap_or_else(|| {
            panic!("no {what:?} in {:?}", String::from_utf8_lossy(&shown));
        });
        shown.drain(..at + what.len());
    }

    fn modes(&self) -> Termios {
        tcgetattr(&self.slave).unwrap()
    }

    /// `aegis exec -t`.
    fn exec(&self, house: &House, args: &[&str]) -> Client {
        self.aegis(house, &[&["exec", "-t"], args].concat())
    }

    /// The program, in a session that this terminal controls.
    pub fn aegis(&self, house: &House, args: &[&str]) -> Client {
        let slave = || Stdio::from(self.slave.try_clone().unwrap());
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(aegis_tests::programs().join("aegis"));
        command.args(args).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        command.env("AEGIS_HOME", house.home()).env("TERM", "screen-256color");
        Client(command.stdin(slave()).stdout(slave()).stderr(slave()).spawn().unwrap())
    }
}

/// The program; it does not outlive its test.
pub struct Client(pub Child);

impl Client {
    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    #[track_caller]
    pub fn ends(&mut self, code: i32) {
        let mut ended = None;
        wait_until("the program ends", DEADLINE, || {
            ended = self.0.try_wait().unwrap();
            ended.is_some()
        });
        assert_eq!(ended.unwrap().code(), Some(code));
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A machine to run commands in: `box`.
pub fn machine(house: &House) {
    let body = json!({"handle": "box", "command": ["sleep", "infinity"]});
    house.socket().post("/v1/instances", &body).expect(201);
    house.until_instance("box", "running");
}

/// How many processes inside have this line of arguments.
fn count(house: &House, line: &str) -> usize {
    // The script's own shell must not count itself.
    let (first, rest) = line.split_at(1);
    let script = format!(
        "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -o '[{first}]{rest} ' | wc -l"
    );
    house.sh("box", &script).text().parse().unwrap()
}

#[track_caller]
pub fn until_count(house: &House, line: &str, n: usize) {
    wait_until(&format!("{line} runs {n} times"), DEADLINE, || count(house, line) == n);
}

const SHELL: [&str; 5] = ["box", "--", "bash", "--norc", "--noprofile"];

#[test]
fn a_shell_behaves_as_at_a_terminal() {
    let house = House::new(SERVING);
    machine(&house);
    let screen = Screen::new(50, 132);
    let before = screen.modes();
    let mut client = screen.exec(&house, &SHELL);
    screen.typed("echo [$(stty size)] [$TERM] [$(tty)]\r");
    screen.shows("[50 132] [screen-256color] [/dev/pts/");
    assert_ne!(screen.modes().local_modes, before.local_modes, "raw");

    // Of a new size the foreground hears.
    screen.typed("sh -c 'trap \"stty size\" WINCH; echo re\"\"ady; while :; do sleep 0.1; done'\r");
    screen.shows("ready");
    screen.resize(30, 100);
    screen.shows("30 100");

    // Ctrl-C ends what is in the foreground, and not the shell.
    screen.typed("\x03");
    screen.typed("echo [$?]\r");
    screen.shows("[130]");
    screen.typed("sleep 1000\r");
    until_count(&house, "sleep 1000", 1);
    screen.typed("\x03");
    screen.typed("echo [$?]\r");
    screen.shows("[130]");
    assert_eq!(count(&house, "sleep 1000"), 0);

    // Jobs.
    screen.typed("sleep 1001 & jobs\r");
    screen.shows("Running");
    screen.typed("sleep 1002\r");
    until_count(&house, "sleep 1002", 1);
    screen.typed("\x1a");
    screen.shows("Stopped");
    screen.typed("kill %1 %2; wait; echo go\"\"ne\r");
    screen.shows("gone");

    // Much at once, more than any buffer on the way, and every byte.
    screen.typed("seq 200000 | md5sum; seq 200000; echo al\"\"l\r");
    screen.shows("199999\r\n200000\r\nall");

    // So does what is pasted.
    screen.typed("stty -echo; echo re''ady; cat > /tmp/pasted; stty echo; wc -c < /tmp/pasted\r");
    screen.shows("ready");
    screen.typed(&"0123456789\r".repeat(20_000));
    screen.typed("\x04");
    screen.shows("220000");

    screen.typed("exit 7\r");
    client.ends(7);
    assert_eq!(format!("{:?}", screen.modes()), format!("{before:?}"), "as it was");

    let mut client = screen.exec(&house, &["box", "--", "/no/such"]);
    screen.shows("can't run /no/such");
    client.ends(1);
    let mut client = screen.exec(&house, &["--timeout", "1s", "box", "--", "sleep", "1005"]);
    screen.shows("its deadline ended it");
    client.ends(137);

    // A paused machine wakes for it.
    house.socket().post("/v1/instances/box/pause", &json!({})).expect(200);
    let mut client = screen.exec(&house, &["box", "--", "sh", "-c", "echo a''wake; exit 3"]);
    screen.shows("awake");
    client.ends(3);
}

#[test]
fn a_client_that_leaves_takes_its_session_along() {
    let mut house = House::new(SERVING);
    machine(&house);
    let screen = Screen::new(24, 80);
    let before = screen.modes();
    for (signal, code) in
        [(Signal::TERM, Some(143)), (Signal::HUP, Some(129)), (Signal::KILL, None)]
    {
        let mut client = screen.exec(&house, &SHELL);
        screen.typed("sleep 1003 & sleep 1004\r");
        until_count(&house, "sleep 1003", 1);
        until_count(&house, "sleep 1004", 1);
        client.signal(signal);
        match code {
            Some(code) => {
                client.ends(code);
                assert_eq!(format!("{:?}", screen.modes()), format!("{before:?}"), "{signal:?}");
            }
            None => drop(client),
        }
        for line in ["sleep 1003", "sleep 1004", "bash --norc --noprofile"] {
            until_count(&house, line, 0);
        }
    }
    // Also what does not listen to the hangup, and what floods.
    for script in [
        "trap '' HUP; echo re''ady; while : mark1008 ; do sleep 1006; done",
        "echo re''ady; while : mark1008 ; do echo yes; done",
    ] {
        let client = screen.exec(&house, &["box", "--", "sh", "-c", script]);
        screen.shows("ready");
        drop(client);
        until_count(&house, "mark1008", 0);
    }

    // A daemon that ends takes them along too, and says so.
    // The killed program could not give its terminal back: this is another.
    let screen = Screen::new(24, 80);
    let mut client = screen.exec(&house, &["box", "--", "sh", "-c", "echo re''ady; sleep 1009"]);
    screen.shows("ready");
    house.stop();
    screen.shows("attached commands end with it");
    client.ends(1);
    assert_eq!(format!("{:?}", screen.modes()), format!("{before:?}"));
    house.start();
    until_count(&house, "sleep 1009", 0);

    let mut command = Command::new(aegis_tests::programs().join("aegis"));
    command.args(["exec", "-t", "box", "--", "true"]).env("AEGIS_HOME", house.home());
    let output = command.stdin(Stdio::null()).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{words}");
    assert!(words.contains("needs a terminal as standard input"), "{words}");
}

pub type Socket = WebSocketStream<TcpStream>;

pub async fn socket(house: &House, name: &str, token: Option<&str>) -> Result<Socket, Error> {
    let url = format!("ws://{}/v1/instances/{name}/exec", house.address());
    let mut request = url.into_client_request().unwrap();
    if let Some(token) = token {
        let value = format!("Bearer {token}").parse().unwrap();
        request.headers_mut().insert("authorization", value);
    }
    let stream = TcpStream::connect(house.address()).await.unwrap();
    Ok(tokio_tungstenite::client_async(request, stream).await?.0)
}

/// The status of a handshake that must fail.
async fn no_socket(house: &House, name: &str, token: Option<&str>) -> u16 {
    match socket(house, name, token).await {
        Err(Error::Http(answer)) => answer.status().as_u16(),
        other => panic!("{other:?}"),
    }
}

/// The next message of text; bytes and pings are passed over. `None` when it was closed.
pub async fn text(socket: &mut Socket) -> Option<Value> {
    loop {
        match tokio::time::timeout(DEADLINE, socket.next()).await.expect("an answer") {
            Some(Ok(Message::Text(text))) => return Some(serde_json::from_str(&text).unwrap()),
            Some(Ok(Message::Binary(_) | Message::Ping(_))) => {}
            _ => return None,
        }
    }
}

fn start(command: &[&str]) -> Message {
    let tty = json!({"size": {"rows": 24, "cols": 80}});
    Message::text(json!({"command": command, "tty": tty}).to_string())
}

#[test]
fn who_speaks_no_terminal_is_refused_and_hung_up() {
    let house = House::new(SERVING);
    machine(&house);
    house.host().get("/v1/instances/box/exec").refused(426, "");
    let body = json!({"command": ["true"], "tty": true});
    house.socket().post("/v1/instances/box/exec", &body).refused(400, "tty");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let token = house.token();
        let token = Some(token.as_str());
        assert_eq!(no_socket(&house, "box", None).await, 401);
        assert_eq!(no_socket(&house, "nobody", token).await, 404);

        let deep = "[".repeat(100_000);
        let first = [
            Message::text(""),
            Message::text("garbage"),
            Message::text(deep.clone()),
            Message::text(r#"{"command":"sh"}"#),
            Message::text(r#"{"command":["sh"],"tty":true}"#),
            Message::text(r#"{"command":["sh"],"tty":{"size":{"rows":70000,"cols":80}}}"#),
            Message::text(r#"{"command":[],"tty":{"size":{"rows":24,"cols":80}}}"#),
            Message::binary(vec![0xff; 100]),
        ];
        for message in first {
            let mut socket = socket(&house, "box", token).await.unwrap();
            socket.send(message.clone()).await.unwrap();
            let said = text(&mut socket).await.unwrap();
            assert!(said["error"].is_string() && said["code"].is_string(), "{message:?}: {said}");
            assert_eq!(text(&mut socket).await, None);
        }

        for bad in [
            "garbage",
            &deep,
            r#"{"resize":{"rows":99999999999999999999,"cols":1}}"#,
            r#"{"resize":{"rows":0,"cols":0}}"#,
            r#"{"resize":{"rows":-1,"cols":80}}"#,
            r#"{"done":true}"#,
        ] {
            let mut socket = socket(&house, "box", token).await.unwrap();
            socket.send(start(&["sleep", "1007"])).await.unwrap();
            assert!(text(&mut socket).await.unwrap()["exec_id"].is_string());
            socket.send(Message::text(bad)).await.unwrap();
            let said = text(&mut socket).await.unwrap();
            assert_eq!(said["code"], "invalid_field", "{bad:.80}: {said}");
            assert_eq!(text(&mut socket).await, None);
        }

        // A message beyond the bound ends it; one that floods with sizes harms nobody.
        let mut large = socket(&house, "box", token).await.unwrap();
        large.send(start(&["sleep", "1007"])).await.unwrap();
        assert!(text(&mut large).await.unwrap()["exec_id"].is_string());
        let _ = large.send(Message::binary(vec![b'x'; 1 << 20])).await;
        assert_eq!(text(&mut large).await, None);
        let mut flood = socket(&house, "box", token).await.unwrap();
        flood.send(start(&["sh", "-c", "read line; exit 5"])).await.unwrap();
        for side in 1..=2000 {
            let size = json!({"resize": {"rows": side, "cols": 4096}}).to_string();
            flood.send(Message::text(size)).await.unwrap();
        }
        flood.send(Message::binary(&b"now\r"[..])).await.unwrap();
        assert!(text(&mut flood).await.unwrap()["exec_id"].is_string());
        let done = text(&mut flood).await.unwrap();
        assert!(done["done"] == true && done["exit_code"] == 5, "{done}");
    });
    until_count(&house, "sleep 1007", 0);
    house.host().get("/v1/status").expect(200);
}
