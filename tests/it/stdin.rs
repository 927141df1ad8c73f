//! Input of commands (contracts/aegis.md 1): the real program at pipes, clients of its WebSocket, and
//! machines that live for one command.

use std::io::{Read as _, Write as _};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::Duration;

use aegis_tests::house::{House, Ran, SERVING};
use aegis_tests::pipes::flood;
use aegis_tests::wait_until;
use futures_util::SinkExt as _;
use rustix::process::{Pid, Signal};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio_tungstenite::tungstenite::Message;

use crate::terminal::{Client, Screen, machine, socket, text, until_count};

/// Whatever is waited for comes within this, or never.
const DEADLINE: Duration = Duration::from_secs(60);
/// More than all buffers on the way to a command hold.
const UNDER_WAY_MAX: usize = 8 << 20;

fn aegis(house: &House, args: &[&str]) -> Command {
    let mut command = Command::new(aegis_tests::programs().join("aegis"));
    command.args(args).env("AEGIS_HOME", house.home());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The program, and its standard input, which stays open until it is dropped.
fn begin(house: &House, args: &[&str]) -> (Child, ChildStdin) {
    let mut child = aegis(house, args).spawn().unwrap();
    let stdin = child.stdin.take().unwrap();
    (child, stdin)
}

/// All of it, with this as standard input.
pub fn ran(house: &House, args: &[&str], input: &[u8]) -> Output {
    let (child, mut stdin) = begin(house, args);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The command may not want it all.
            let _ = stdin.write_all(input);
        });
        child.wait_with_output().unwrap()
    })
}

#[track_caller]
fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn sh(script: &str) -> [&str; 7] {
    ["exec", "-i", "box", "--", "sh", "-c", script]
}

#[test]
fn input_goes_in_and_output_comes_out_byte_for_byte() {
    let mut house = House::new(SERVING);
    machine(&house);

    // Much more than any buffer on the way, both ways at once.
    let mut big = vec![0; 50 << 20];
    getrandom::fill(&mut big).unwrap();
    let out = ran(&house, &["exec", "-i", "box", "--", "cat"], &big);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(Sha256::digest(&out.stdout), Sha256::digest(&big));
    let out = ran(&house, &["exec", "-i", "box", "--", "sha256sum"], &big);
    let hex: String = Sha256::digest(&big).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(String::from_utf8(out.stdout).unwrap().split(' ').next(), Some(hex.as_str()));
    drop(big);

    // Output comes after the end of the input; both of them apart, and the exit code.
    let out = ran(&house, &sh("cat >&2; printf 'a\\377\\000z'; exit 7"), b"in\xff\0\nput");
    assert_eq!((out.status.code(), &out.stdout[..]), (Some(7), &b"a\xff\0z"[..]));
    assert_eq!(out.stderr, b"in\xff\0\nput");
    let out = ran(&house, &["exec", "-i", "box", "--", "sh"], b"echo $((6 * 7))\nexit 3\n");
    assert_eq!((out.status.code(), &out.stdout[..]), (Some(3), &b"42\n"[..]));
    // One that closed its outputs still reads.
    let script = "exec >&- 2>&-; wc -c > /tmp/counted";
    assert!(ran(&house, &sh(script), &vec![7; 3 << 20]).status.success());
    assert_eq!(house.ok("box", "cat /tmp/counted"), (3 << 20).to_string());

    // A command that ends ends this, though nobody writes or ends its input, and though it is full.
    let (mut child, open) = begin(&house, &sh("echo early; exit 4"));
    let mut said = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut said).unwrap();
    assert_eq!((child.wait().unwrap().code(), &said[..]), (Some(4), &b"early\n"[..]));
    drop(open);
    let out = ran(&house, &sh("head -c 1000 | wc -c; exit 5"), &vec![b'x'; 30 << 20]);
    assert_eq!((out.status.code(), &out.stdout[..]), (Some(5), &b"1000\n"[..]));
    let out = ran(&house, &["exec", "-i", "box", "--", "/no/such"], b"x");
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("can't run /no/such"));
    let timed = ["exec", "-i", "--timeout", "1s", "box", "--", "sleep", "2000"];
    let (mut child, open) = begin(&house, &timed);
    assert_eq!(child.wait().unwrap().code(), Some(137));
    drop(open);

    // A paused machine wakes for it.
    house.socket().post("/v1/instances/box/pause", &json!({})).expect(200);
    let out = ran(&house, &["exec", "-i", "box", "--", "cat"], b"awake");
    assert_eq!((out.status.code(), &out.stdout[..]), (Some(0), &b"awake"[..]));

    // Its output is logged, as far as that goes, and its input is not.
    ran(&house, &sh("cat > /dev/null; echo sa''id; seq 300000"), b"not-to-be-logged\n");
    let logs = house.socket().get("/v1/instances/box/logs").lines();
    let logged = |line: &str| logs.iter().any(|entry| entry["line"] == line);
    assert!(logged("said") && logged("1000") && !logged("299999") && !logged("not-to-be-logged"));
    let last = logs.last().unwrap()["line"].as_str().unwrap();
    assert!(last.ends_with("went to its client alone"), "{last}");

    // All of it at once, where somebody has all of it.
    let post = |body| house.socket().post("/v1/instances/box/exec", &body);
    let cat = |field: &str, input: &str| {
        let answer = post(json!({"command": ["cat"], field: input}));
        assert_eq!(answer.status, 200, "{field}");
        Ran::of(&answer.lines()).out
    };
    assert_eq!(cat("stdin", "h\u{e9}llo"), "h\u{e9}llo".as_bytes());
    assert_eq!(cat("stdin_b64", "/wAKeA=="), b"\xff\0\nx");
    let much = "y".repeat(200_000);
    assert_eq!(cat("stdin", &much), much.as_bytes());
    let unread = post(json!({"command": ["sh", "-c", "exit 6"], "stdin": much}));
    assert_eq!(Ran::of(&unread.lines()).code, Some(6));
    post(json!({"command": ["cat"], "stdin_b64": "?"})).refused(400, "stdin_b64");
    post(json!({"command": ["cat"], "stdin": "", "stdin_b64": ""})).refused(400, "stdin_b64");

    who_speaks_otherwise_is_refused(&house);

    // A daemon that ends takes them along, and says so.
    let (child, open) = begin(&house, &sh("echo re''ady; exec sleep 2003"));
    until_count(&house, "sleep 2003", 1);
    house.stop();
    let out = child.wait_with_output().unwrap();
    drop(open);
    assert_eq!((out.status.code(), &out.stdout[..]), (Some(1), &b"ready\n"[..]));
    assert!(String::from_utf8_lossy(&out.stderr).contains("attached commands end with it"));
    house.start();
    until_count(&house, "sleep 2003", 0);
}

fn who_speaks_otherwise_is_refused(house: &House) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let token = house.token();
        let end = || Message::text("\"stdin_end\"");
        let at_a_terminal = json!({"size": {"rows": 24, "cols": 80}});
        for (tty, said) in [
            (None, vec![Message::text(r#"{"resize":{"rows":24,"cols":80}}"#)]),
            (None, vec![end(), end()]),
            (None, vec![end(), Message::binary(vec![b'x'])]),
            (None, vec![Message::text("stdin_end")]),
            (Some(at_a_terminal), vec![end()]),
        ] {
            let mut socket = socket(house, "box", Some(&token)).await.unwrap();
            let start = json!({"command": ["sleep", "2002"], "tty": tty}).to_string();
            socket.send(Message::text(start)).await.unwrap();
            assert!(text(&mut socket).await.unwrap()["exec_id"].is_string());
            for message in said.clone() {
                socket.send(message).await.unwrap();
            }
            let answer = text(&mut socket).await.unwrap();
            assert_eq!(answer["code"], "invalid_field", "{said:?}: {answer}");
            assert_eq!(text(&mut socket).await, None);
        }
        // The command of this machine waits for nobody.
        let mut socket = socket(house, "box", Some(&token)).await.unwrap();
        socket.send(Message::text("{}")).await.unwrap();
        assert!(text(&mut socket).await.unwrap()["exec_id"].is_string());
        let done = text(&mut socket).await.unwrap();
        assert!(done["exit_code"].is_null() && done["error"].is_string(), "{done}");
    });
    until_count(house, "sleep 2002", 0);
}

#[test]
fn a_client_that_leaves_ends_its_command_and_none_holds_more_than_agreed() {
    let house = House::new(SERVING);
    machine(&house);

    // A part of an input is never taken for the whole, also by who does not mind the hangup.
    for shell in ["sh", "trap '' HUP; sh"] {
        house.ok("box", "rm -f /tmp/part");
        let script = format!("{shell} -c 'dd bs=4 count=1 of=/tmp/part; cat - - -; : > /tmp/all'");
        let (child, mut stdin) = begin(&house, &sh(&script));
        stdin.write_all(b"part").unwrap();
        wait_until("it has the part", DEADLINE, || {
            house.sh("box", "test -s /tmp/part").code == Some(0)
        });
        kill(child);
        until_count(&house, "cat - - -", 0);
        assert_eq!(house.ok("box", "cat /tmp/part; test ! -e /tmp/all"), "part");
    }

    // A client that leaves in the moment in which its command has ended harms nobody: not its machine,
    // which has one process that must not fail.
    let boot = house.ok("box", "cat /proc/sys/kernel/random/boot_id");
    for _ in 0..10 {
        let (mut child, stdin) = begin(&house, &sh("sleep 2002 & echo over"));
        let mut over = [0; 5];
        child.stdout.as_mut().unwrap().read_exact(&mut over).unwrap();
        kill(child);
        drop(stdin);
    }
    assert_eq!(house.ok("box", "cat /proc/sys/kernel/random/boot_id"), boot);
    house.ok("box", "pkill -f '[s]leep 2002' || true");

    // A command that never reads holds its client up, and nobody in between holds what comes.
    let (mut idle, stdin) = begin(&house, &["exec", "-i", "box", "--", "sleep", "2001"]);
    let taken = flood(&stdin, 4 * UNDER_WAY_MAX);
    assert!(taken < UNDER_WAY_MAX, "{taken} bytes are somewhere");
    assert!(idle.try_wait().unwrap().is_none());
    until_count(&house, "sleep 2001", 1);
    // Also so its leaving is seen.
    kill(idle);
    until_count(&house, "sleep 2001", 0);

    // So is who does not take what a command puts out; it goes on where it was when he does.
    let (mut child, mut stdin) = begin(&house, &["exec", "-i", "box", "--", "cat"]);
    let taken = flood(&stdin, 4 * UNDER_WAY_MAX);
    assert!(taken < UNDER_WAY_MAX, "{taken} bytes are somewhere");
    let mut out = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        out.read_to_end(&mut all).unwrap();
        all
    });
    rustix::io::ioctl_fionbio(&stdin, false).unwrap();
    stdin.write_all(&[b'x'; 100_000]).unwrap();
    drop(stdin);
    let all = reader.join().unwrap();
    assert!(all.len() == taken + 100_000 && all.iter().all(|b| *b == b'x'));
    assert!(child.wait().unwrap().success());

    let out = ran(&house, &["--json", "exec", "-i", "box", "--", "true"], b"");
    assert_eq!(out.status.code(), Some(2));
}

fn machines(house: &House) -> usize {
    house.socket().get("/v1/instances").expect(200).as_array().unwrap().len()
}

#[test]
fn a_machine_for_one_command_ends_with_it_and_with_its_client() {
    let house = House::new(SERVING);
    let small = ["run", "--memory", "256M"];
    let run = |args: &[&'static str]| [&small[..], args].concat();

    let out = ran(&house, &run(&["-i", "--", "sh", "-c", "cat; echo e >&2; exit 9"]), b"hi\xff");
    assert_eq!((out.status.code(), &out.stdout[..]), (Some(9), &b"hi\xff"[..]));
    assert_eq!(out.stderr, b"e\n");
    let out = ran(&house, &run(&["-i", "--", "/no/such"]), b"");
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("can't run /no/such"));
    assert_eq!(machines(&house), 0);

    let screen = Screen::new(50, 132);
    let mut client = screen.aegis(&house, &run(&["-it", "--", "bash", "--norc", "--noprofile"]));
    screen.shows("# ");
    screen.typed("echo [$(stty size)] [$TERM] [$AEGIS_INSTANCE_ID]; exit 7\r");
    screen.shows("[50 132] [screen-256color] [inst-");
    client.ends(7);
    assert_eq!(machines(&house), 0);

    // Whatever takes the client away: the machine goes with it.
    let until_it_runs = || {
        wait_until("it runs", DEADLINE, || {
            let all = house.socket().get("/v1/instances").expect(200);
            all[0]["state"] == "running"
        });
    };
    let ends = |mut client: Client, signal, code| {
        until_it_runs();
        client.signal(signal);
        client.ends(code);
        assert_eq!(machines(&house), 0, "{signal:?}");
    };
    let asleep = ["--", "sleep", "2004"];
    ends(screen.aegis(&house, &run(&[&["-it"], &asleep[..]].concat())), Signal::HUP, 129);
    let (child, _open) = begin(&house, &run(&[&["-i"], &asleep[..]].concat()));
    ends(Client(child), Signal::TERM, 143);
    // Who can do nothing any more leaves a record, and nothing that runs.
    let (child, _open) = begin(&house, &run(&[&["-i", "--name", "left"], &asleep[..]].concat()));
    until_it_runs();
    rustix::process::kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
    kill(child);
    let left = house.until_instance("left", "stopped");
    assert_eq!(left["exit"]["code"], 129, "{left}");
}
