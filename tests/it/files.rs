//! Files of machines: put in, taken out, listed, watched; by the host, and by a parent. One boot
//! serves many checks.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aegis_tests::house::House;
use aegis_tests::http::Answer;
use aegis_tests::{look, wait_until};
use aegis_wire::path::escape;
use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};

use super::cli::{Said, aegis, program};
use super::tree::{API, curl, denied, rights, root, small, text, trail};

/// The most that the daemon may ever have had in memory, KiB.
const PEAK_MAX_KB: u64 = 200 * 1024;
/// A file that is much larger than that.
const LARGE: usize = 256 << 20;

/// Where a machine's files are asked for.
fn at(id: &str, path: impl AsRef<[u8]>, more: &str) -> String {
    format!("/v1/instances/{id}/files?path={}{more}", escape(path))
}

fn put(house: &House, id: &str, path: &str, more: &str, bytes: impl Into<Bytes>) -> Answer {
    house.socket().send(Method::PUT, &at(id, path, more), bytes.into()).unwrap()
}

fn code(answer: &Answer, status: u16) -> String {
    answer.expect(status)["code"].as_str().unwrap().to_owned()
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    getrandom::fill(&mut noise).unwrap();
    noise
}

/// The entries of a directory, by name.
fn list(house: &House, id: &str, path: &str) -> Vec<Value> {
    let listed = house.socket().get(&at(id, path, "&list=true")).expect(200);
    assert_eq!(listed["truncated"], false);
    let mut entries = listed["entries"].as_array().unwrap().clone();
    entries.sort_by_key(|e| e["name"].as_str().unwrap().to_owned());
    entries
}

fn names(house: &House, id: &str, path: &str) -> Vec<String> {
    list(house, id, path).iter().map(|e| e["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn files_go_in_and_come_out_as_they_are() {
    let house = House::new("[rate_limit]\nper_second = 0\n");
    let id = root(&house, "web", rights(1));
    bytes_survive(&house, &id);
    directories_and_links(&house, &id);
    odd_names(&house, &id);
    what_is_refused(&house, &id);
    what_is_watched(&house, &id);
    who_leaves_leaves_nothing(&house, &id);
    a_full_disk_keeps_nothing(&house, &id);
    large_files_stream(&house, &id);
    asleep_and_stopped(&house, &id);
}

fn bytes_survive(house: &House, id: &str) {
    for size in [0, 1, 65_535, 65_536, 65_537, 1_000_003] {
        let bytes = noise(size);
        let made = put(house, id, "/root/noise", "&mode=0640&uid=33&gid=34", bytes.clone());
        let made = made.expect(200);
        assert_eq!((&made["size"], &made["mode"]), (&json!(size), &json!("0640")), "{made}");
        let read = house.socket().get(&at(id, "/root/noise", ""));
        assert_eq!((read.status, read.body.len()), (200, size));
        assert!(read.body == bytes, "{size} bytes are others");
        assert_eq!(read.headers["x-aegis-mode"], "0640");
    }
    assert_eq!(house.ok(id, "stat -c %a:%u:%g /root/noise"), "640:33:34");
    // What is overwritten stays whose it was.
    put(house, id, "/root/noise", "", "0123456789").expect(200);
    assert_eq!(house.ok(id, "stat -c %a:%u:%g:%s /root/noise"), "640:33:34:10");
    let head = house.socket().ask(Method::HEAD, &at(id, "/root/noise", ""), None).unwrap();
    assert_eq!((head.status, &head.headers["content-length"]), (200, &"10".parse().unwrap()));
    assert_eq!((&head.headers["x-aegis-kind"], head.body.len()), (&"file".parse().unwrap(), 0));
    let part = |range: &str| {
        house.socket().with(hyper::header::RANGE, range).get(&at(id, "/root/noise", ""))
    };
    let some = part("bytes=2-4");
    assert_eq!((some.status, &some.body[..]), (206, &b"234"[..]));
    assert_eq!(some.headers["content-range"], "bytes 2-4/10");
    assert_eq!(&part("bytes=7-").body[..], b"789");
    assert_eq!(part("bytes=10-").status, 416);
    // Files that do not know their size.
    let read = house.socket().get(&at(id, "/proc/version", ""));
    assert_eq!(read.status, 200);
    assert!(read.body.starts_with(b"Linux version"), "{:?}", read.body);
}

fn directories_and_links(house: &House, id: &str) {
    let socket = house.socket();
    let made = socket.act(&at(id, "/srv/a/b", "&op=mkdir&mode=0750&create_dirs=true"));
    assert_eq!(made.expect(200)["kind"], "dir");
    assert_eq!(code(&socket.act(&at(id, "/srv/a/b", "&op=mkdir")), 409), "file_exists");
    let link = socket.act(&at(id, "/srv/a/link", "&op=symlink&target=..%2F..%2Fetc%2Fshadow"));
    assert_eq!(link.expect(200)["target"], "../../etc/shadow");
    put(house, id, "/srv/a/b/new/deep", "&create_dirs=1&mode=755", "#!").expect(200);
    assert_eq!(house.ok(id, "stat -c %a /srv/a/b /srv/a/b/new /srv/a/b/new/deep"), "750\n755\n755");
    let entries = list(house, id, "/srv/a");
    assert_eq!(entries.len(), 2, "{entries:?}");
    assert_eq!((&entries[0]["kind"], &entries[0]["mode"]), (&json!("dir"), &json!("0750")));
    assert_eq!((&entries[1]["kind"], &entries[1]["uid"]), (&json!("link"), &json!(0)));
    // A link that is written to is replaced; what it points to is not.
    house.ok(id, "echo kept > /srv/kept; ln -s kept /srv/l");
    put(house, id, "/srv/l", "", "new").expect(200);
    assert_eq!(house.ok(id, "cat /srv/kept; stat -c %F /srv/l"), "kept\nregular file");
    let moved = socket.act(&at(id, "/srv/a", "&op=rename&to=/srv/z"));
    assert_eq!(moved.expect(200)["kind"], "dir");
    assert_eq!(code(&socket.delete(&at(id, "/srv/z", "")), 409), "directory_not_empty");
    assert_eq!(
        socket.delete(&at(id, "/srv/z", "&recursive=true")).expect(200)["status"],
        "removed"
    );
    assert_eq!(names(house, id, "/srv"), ["kept", "l"]);
}

fn odd_names(house: &House, id: &str) {
    let odd: [&[u8]; 4] = [b"with space", b"new\nline", b"no \xff text", "ä?&#%2e".as_bytes()];
    house.ok(id, "mkdir /root/odd");
    for name in odd {
        let path = [b"/root/odd/", name].concat();
        let to = at(id, &path, "");
        house.socket().send(Method::PUT, &to, Bytes::copy_from_slice(name)).unwrap().expect(200);
        assert_eq!(&house.socket().get(&to).body[..], name);
    }
    let mut found: Vec<Vec<u8>> = list(house, id, "/root/odd")
        .iter()
        .map(|e| aegis_wire::files::exact(text(e, "name"), e["name_b64"].as_str()).unwrap())
        .collect();
    found.sort();
    let mut wanted: Vec<Vec<u8>> = odd.map(<[u8]>::to_vec).to_vec();
    wanted.sort();
    assert_eq!(found, wanted);
    assert_eq!(house.ok(id, "cat /root/odd/no*").as_bytes(), "no \u{fffd} text".as_bytes());
}

fn what_is_refused(house: &House, id: &str) {
    let socket = house.socket();
    let get = |path: &str, more: &str| socket.get(&at(id, path, more));
    assert_eq!(code(&get("/no/such", ""), 404), "file_not_found");
    assert_eq!(code(&get("/root", ""), 409), "is_a_directory");
    assert_eq!(code(&get("/etc/passwd", "&list=true"), 409), "not_a_directory");
    assert_eq!(code(&get("/etc/passwd/x", ""), 409), "not_a_directory");
    assert_eq!(code(&get("/dev/zero", ""), 409), "not_a_file");
    house.ok(id, "mkfifo /root/pipe");
    assert_eq!(code(&get("/root/pipe", ""), 409), "not_a_file");
    assert_eq!(code(&put(house, id, "/root", "", "x"), 409), "is_a_directory");
    assert_eq!(code(&put(house, id, "/no/such/x", "", "x"), 404), "file_not_found");
    assert_eq!(code(&put(house, id, "/proc/x", "", "x"), 404), "file_not_found");
    let long = format!("/root/{}", "x".repeat(300));
    assert_eq!(code(&put(house, id, &long, "", "x"), 400), "bad_file_name");
    for (path, more) in [
        ("relative", ""),
        ("", ""),
        ("/a\0b", ""),
        ("/a", "&list=maybe"),
        ("/a", "&recursiv=true"),
        (&format!("/{}", "x".repeat(5000)), ""),
    ] {
        assert_eq!(code(&get(path, more), 400), "invalid_field", "{path:.20} {more}");
    }
    let mode = put(house, id, "/root/x", "&mode=rw", "x");
    assert_eq!(mode.expect(400)["field"], "mode");
    assert_eq!(code(&socket.act(&at(id, "/root/x", "&op=chmod")), 400), "invalid_field");
    assert_eq!(code(&socket.delete(&at(id, "/", "&recursive=true")), 403), "file_denied");
    assert_eq!(code(&socket.get(&at("inst-no", "/etc/passwd", "")), 404), "instance_not_found");
    let stranger = house.anybody().get(&at(id, "/etc/passwd", ""));
    assert_eq!(code(&stranger, 401), "unauthorized");
}

fn what_is_watched(house: &House, id: &str) {
    house.ok(id, "mkdir -p /root/seen/below");
    let path = format!("/v1/instances/{id}/files/watch?path=/root/seen&recursive=true");
    let mut lines = raw(house, &format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n"));
    lines.get_ref().set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut next = || loop {
        let mut line = String::new();
        assert_ne!(lines.read_line(&mut line).unwrap(), 0, "the watch ended");
        // Between heads and chunks of HTTP.
        if let Ok(event @ Value::Object(_)) = serde_json::from_str(&line) {
            break event;
        }
    };
    assert_eq!(next()["event"], "watching");
    put(house, id, "/root/seen/below/file", "", "x").expect(200);
    let mut until = |event: &str, path: &str| loop {
        let got = next();
        if got["event"] == event && got["path"] == path {
            break got;
        }
    };
    let new = until("created", "/root/seen/below/file");
    assert_eq!(new["dir"], false, "{new}");
    house.ok(id, "mkdir -p /root/seen/x/y; echo a > /root/seen/x/y/z");
    assert_eq!(until("created", "/root/seen/x")["dir"], true);
    until("created", "/root/seen/x/y/z");
    house.ok(id, "echo more >> /root/seen/below/file; rm /root/seen/below/file");
    until("modified", "/root/seen/below/file");
    until("removed", "/root/seen/below/file");
    house.ok(id, "rm -r /root/seen");
    until("gone", "/root/seen");
    let none = house.socket().get(&path.replace("seen", "unseen"));
    assert_eq!(code(&none, 404), "file_not_found");
}

/// A request as it is, and what comes back as it comes.
fn raw(house: &House, request: &str) -> BufReader<UnixStream> {
    let mut stream = UnixStream::connect(house.home().join("aegisd.sock")).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    BufReader::new(stream)
}

fn who_leaves_leaves_nothing(house: &House, id: &str) {
    house.ok(id, "mkdir /root/left");
    let drafts = || names(house, id, "/root/left");
    let request = format!(
        "PUT {} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n",
        at(id, "/root/left/file", "")
    );
    let client = raw(house, &request);
    client.get_ref().write_all(&noise(500_000)).unwrap();
    wait_until("it is being written", Duration::from_secs(60), || !drafts().is_empty());
    assert!(drafts()[0].starts_with(".aegis-draft-"));
    drop(client);
    wait_until("nothing of it is left", Duration::from_secs(60), || drafts().is_empty());
    // A download that nobody takes to its end ends too.
    house.ok(id, "head -c 50000000 /dev/zero > /root/left/zero");
    let request =
        format!("GET {} HTTP/1.1\r\nhost: localhost\r\n\r\n", at(id, "/root/left/zero", ""));
    let mut client = raw(house, &request);
    client.read_exact(&mut [0; 100_000]).unwrap();
    let open = "ls -l /proc/1/fd | grep -c /root/left/zero || true";
    assert_eq!(house.ok(id, open), "1");
    drop(client);
    wait_until("it is closed inside", Duration::from_secs(60), || house.ok(id, open) == "0");
    house.ok(id, "rm -r /root/left");
}

fn a_full_disk_keeps_nothing(house: &House, id: &str) {
    house.ok(id, "mkdir /mnt/tiny; mount -t tmpfs -o size=1m none /mnt/tiny");
    // Seen from the length, and without one only on the way.
    let answer = put(house, id, "/mnt/tiny/x", "", noise(3 << 20));
    assert_eq!(code(&answer, 507), "no_space");
    let request = format!(
        "PUT {} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n",
        at(id, "/mnt/tiny/x", "")
    );
    let mut client = raw(house, &request);
    let chunk = noise(65_536);
    for _ in 0..48 {
        let mut stream = client.get_ref();
        write!(stream, "{:x}\r\n", chunk.len()).unwrap();
        stream.write_all(&chunk).unwrap();
        stream.write_all(b"\r\n").unwrap();
    }
    client.get_ref().write_all(b"0\r\n\r\n").unwrap();
    let mut said = String::new();
    client.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("HTTP/1.1 507") && said.contains("no_space"), "{said}");
    assert_eq!(names(house, id, "/mnt/tiny"), Vec::<String>::new());
    put(house, id, "/mnt/tiny/x", "", noise(100_000)).expect(200);
    house.ok(id, "mount -o remount,ro /mnt/tiny");
    assert_eq!(code(&put(house, id, "/mnt/tiny/y", "", "x"), 403), "read_only");
    house.ok(id, "umount /mnt/tiny");
}

fn large_files_stream(house: &House, id: &str) {
    let daemon = house.pid().as_raw_nonzero().get();
    let bytes = Bytes::from(noise(LARGE));
    let begun = Instant::now();
    put(house, id, "/root/large", "", bytes.clone()).expect(200);
    let up = begun.elapsed();
    let begun = Instant::now();
    let read = house.socket().get(&at(id, "/root/large", ""));
    let down = begun.elapsed();
    assert_eq!(read.status, 200);
    assert!(read.body == bytes, "the large file is another one");
    let speed = |took: Duration| (LARGE >> 20) as f64 / took.as_secs_f64();
    eprintln!("{:.1} MiB/s up, {:.1} MiB/s down", speed(up), speed(down));
    let peak = look::peak_kb(daemon).unwrap();
    assert!(peak < PEAK_MAX_KB, "the daemon has had {peak} KiB");
    house.socket().delete(&at(id, "/root/large", "")).expect(200);
}

fn asleep_and_stopped(house: &House, id: &str) {
    let socket = house.socket();
    socket.act(&format!("/v1/instances/{id}/pause")).expect(200);
    assert_eq!(socket.get(&at(id, "/etc/hostname", "")).status, 200, "it was woken");
    socket.act(&format!("/v1/instances/{id}/stop")).expect(200);
    assert_eq!(code(&socket.get(&at(id, "/etc/hostname", "")), 409), "instance_state");
    assert_eq!(code(&put(house, id, "/root/x", "", "x"), 409), "instance_state");
}

/// A tree as text: kind, permissions, content or target of each entry.
const SHOW: &str = "cd $1 && find . -printf '%y %#m %P %l\\0' | sort -z | tr '\\0' '|'; \
                    find . -type f -print0 | sort -z | xargs -0 sha256sum";

#[test]
fn trees_are_copied_by_the_command_line() {
    let house = House::new("[rate_limit]\nper_second = 0\n");
    for name in ["one", "two"] {
        root(&house, name, rights(1));
    }
    let home = house.home();
    let run = |args: &[&str]| aegis(home, args);
    let dir = tempfile::Builder::new().prefix("aegis-it-").tempdir_in("/tmp").unwrap();
    let here = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let make = "mkdir -p tree/empty tree/deep/er; cd tree; head -c 100000 /dev/urandom > a; \
                printf x > 'with space'; printf y > \"$(printf 'new\\nline')\"; \
                printf z > \"$(printf 'no\\377text')\"; ln -s ../../etc/passwd link; ln -s nowhere dead; \
                printf '#!' > deep/er/run; chmod 750 deep/er/run; chmod 500 deep/er; chmod 600 a";
    let sh = |script: &str, arg: &str| {
        let ran = Command::new("sh").args(["-c", script, "sh", arg]).current_dir(&dir).output();
        let ran = ran.unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8_lossy(&ran.stdout).trim_end().to_owned()
    };
    sh(make, "");
    let shown = sh(SHOW, &here("tree"));
    let inside = |name: &str, path: &str| house.ok(name, &format!("set -- {path}; {SHOW}"));
    let done = run(&["--json", "cp", "-r", &here("tree"), "one:/srv"]).json();
    assert_eq!(
        (&done["files"], &done["links"], &done["directories"]),
        (&json!(5), &json!(2), &json!(4))
    );
    assert_eq!(inside("one", "/srv/tree"), shown);
    run(&["cp", "-r", "one:/srv/tree", &here("back")]).good();
    assert_eq!(sh(SHOW, &here("back")), shown);
    // Again over what is there, and from machine to machine.
    run(&["cp", "-r", "one:/srv/tree", "two:/srv/other"]).good();
    run(&["cp", "-r", "one:/srv/tree", "two:/srv/other"]).good();
    assert_eq!(inside("two", "/srv/other/tree"), shown);
    // One file, under another name, into a directory, through pipes.
    run(&["cp", &here("tree/a"), "two:/root/b"]).good();
    run(&["cp", "two:/root/b", dir.path().to_str().unwrap()]).good();
    assert_eq!(std::fs::read(here("b")).unwrap(), std::fs::read(here("tree/a")).unwrap());
    assert_eq!(run(&["cp", "two:/srv/other/with space", "-"]).good(), "x");
    let mut child = program(home);
    child.args(["cp", "-", "two:/root/piped"]).stdin(Stdio::piped()).stderr(Stdio::null());
    let mut child = child.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"through a pipe").unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(house.ok("two", "cat /root/piped"), "through a pipe");
    // A link that is named is followed; a set-user-id program becomes none here.
    house.ok("two", "ln -s piped /root/link; cp /bin/true /root/suid; chmod 4755 /root/suid");
    run(&["cp", "two:/root/link", &here("followed")]).good();
    assert_eq!(std::fs::read(here("followed")).unwrap(), b"through a pipe");
    run(&["cp", "two:/root/suid", &here("suid")]).good();
    assert_eq!(sh("stat -c %a $1", &here("suid")), "755");
    // A link here, planted by an earlier copy, is not written through.
    house.ok("two", &format!("mkdir /root/trap; ln -s {} /root/trap/x", here("tree")));
    run(&["cp", "-r", "two:/root/trap", &here("trap")]).good();
    house.ok("two", "rm /root/trap/x; mkdir /root/trap/x; echo evil > /root/trap/x/a");
    let before = sh(SHOW, &here("tree"));
    run(&["cp", "-r", "two:/root/trap/.", &here("trap")]).bad(2, &["has no name"]);
    run(&["cp", "-r", "two:/root/trap", dir.path().to_str().unwrap()]).bad(1, &["cannot enter"]);
    assert_eq!(sh(SHOW, &here("tree")), before);
    house.ok("two", "mkfifo /root/pipe");
    let done = run(&["--json", "cp", "-r", "two:/root/pipe", &here("p")]).json();
    assert_eq!(done["skipped"], json!(["two:/root/pipe"]));
    // What can't be is said.
    run(&["cp", "two:/srv", &here("x")]).bad(2, &["-r"]);
    run(&["cp", "two:/no/such", &here("x")]).bad(1, &["file_not_found"]);
    let large = dir.path().join("large");
    std::fs::File::create(&large).unwrap().set_len(20 << 20).unwrap();
    let large = large.to_str().unwrap();
    run(&["cp", large, "two:/no/such/x"]).bad(1, &["file_not_found"]);
    run(&["cp", large, "two:/no\n/such/x"]).bad(1, &["file_not_found"]);
    house.ok("two", "mkdir /mnt/tiny; mount -t tmpfs -o size=1m none /mnt/tiny");
    run(&["cp", large, "two:/mnt/tiny/x"]).bad(1, &["no_space"]);
    assert_eq!(house.ok("two", "ls -A /mnt/tiny"), "");
    run(&["cp", &here("no-such"), "two:/root/"]).bad(1, &["no-such"]);
    run(&["cp", "two:relative", &here("x")]).bad(2, &["absolute"]);
    run(&["cp", &here("a"), &here("b")]).bad(2, &["in a machine"]);
    files_are_looked_at(&run, &house);
}

fn files_are_looked_at(run: &dyn Fn(&[&str]) -> Said, house: &House) {
    let listed = run(&["files", "ls", "two:/srv/other/tree"]).good();
    assert!(listed.contains("link -> ../../etc/passwd"), "{listed}");
    assert_eq!(listed.lines().count(), 9, "{listed}");
    assert_eq!(run(&["--json", "files", "stat", "two:/root/piped"]).json()["size"], 14);
    run(&["files", "mkdir", "-p", "two:/root/m/n"]).good();
    run(&["files", "mv", "two:/root/m/n", "/root/m/o"]).good();
    run(&["files", "rm", "two:/root/m"]).bad(1, &["directory_not_empty", "recursive"]);
    run(&["files", "rm", "-r", "two:/root/m"]).good();
    assert_eq!(house.ok("two", "ls -d /root/m || echo gone"), "gone");
}

#[test]
fn a_parent_has_its_childrens_files_and_no_others() {
    let house = House::new("");
    let (top, other) = (root(&house, "top", rights(1)), root(&house, "other", rights(1)));
    let (status, child) =
        curl(&house, &top, &format!("-X POST {API}/v1/instances -d '{}'", small(json!({}))));
    assert_eq!(status, 201, "{child}");
    let child = text(&child, "id").to_owned();
    let files = format!("{API}/v1/instances/{child}/files");
    let ok = |script: &str| house.ok(&top, script);
    ok("head -c 3000000 /dev/urandom > /root/up");
    let made = ok(&format!(
        "curl -sS -f -T /root/up '{files}?path=/srv/in/up&create_dirs=true&mode=0600'"
    ));
    assert!(made.contains("\"size\":3000000") && made.contains("\"0600\""), "{made}");
    ok(&format!("curl -sS -f -o /root/down '{files}?path=/srv/in/up'; cmp /root/up /root/down"));
    let sum = |id: &str, path: &str| house.ok(id, &format!("sha256sum < {path}"));
    assert_eq!(sum(&top, "/root/up"), sum(&child, "/srv/in/up"));
    let part = ok(&format!("curl -sS -D - -o /dev/null -r 5-9 '{files}?path=/srv/in/up'"));
    assert!(part.contains("206") && part.contains("bytes 5-9/3000000"), "{part}");
    let (_, listed) = curl(&house, &top, &format!("'{files}?path=/srv/in&list=true'"));
    assert_eq!(listed["entries"][0]["name"], "up", "{listed}");
    let (_, stat) = curl(&house, &top, &format!("'{files}?path=/srv/in/up&stat=true'"));
    assert_eq!((&stat["kind"], &stat["size"]), (&json!("file"), &json!(3_000_000)));
    let head = ok(&format!("curl -sS -I '{files}?path=/srv/in/up'"));
    assert!(head.contains("content-length: 3000000"), "{head}");
    let (status, _) = curl(&house, &top, &format!("-X POST '{files}?path=/srv/d&op=mkdir'"));
    assert_eq!(status, 200);
    let answer = curl(&house, &top, &format!("'{files}?path=/srv/none'"));
    denied(&answer, 404, "file_not_found", "");
    let answer = curl(&house, &top, &format!("'{files}?path=srv'"));
    denied(&answer, 400, "invalid_field", "");
    house.ok(&child, "mkdir /mnt/tiny; mount -t tmpfs -o size=1m none /mnt/tiny");
    let answer = curl(&house, &top, &format!("-T /root/up '{files}?path=/mnt/tiny/x'"));
    denied(&answer, 507, "no_space", "");
    let answer = curl(
        &house,
        &top,
        &format!("-T /root/up -H 'transfer-encoding: chunked' '{files}?path=/mnt/tiny/x'"),
    );
    denied(&answer, 507, "no_space", "");
    assert_eq!(house.ok(&child, "ls -A /mnt/tiny"), "");
    // A watch, ended by the watcher.
    let seen = ok(&format!(
        "(curl -sS -N '{files}/watch?path=/srv/d' & echo $! > /tmp/w) > /tmp/seen; \
         until grep -q watching /tmp/seen; do sleep 0.1; done; \
         curl -sS -f -T /root/up '{files}?path=/srv/d/x' > /dev/null; \
         until grep -q created /tmp/seen; do sleep 0.1; done; kill $(cat /tmp/w); cat /tmp/seen"
    ));
    assert!(seen.contains("/srv/d/x"), "{seen}");
    let (status, _) =
        curl(&house, &top, &format!("-X DELETE '{files}?path=/srv/d&recursive=true'"));
    assert_eq!(status, 200);
    assert_eq!(house.ok(&child, "ls /srv"), "in");
    for (who, whose) in [(&other, &child), (&child, &top), (&top, &other), (&top, &top)] {
        let files = format!("{API}/v1/instances/{whose}/files?path=/etc/passwd");
        denied(&curl(&house, who, &format!("'{files}'")), 404, "instance_not_found", "");
        let answer = curl(&house, who, &format!("-T /etc/passwd '{files}'"));
        denied(&answer, 404, "instance_not_found", "");
    }
    let written = trail(&house).into_iter().filter(|e| e["kind"] == "instance.files");
    let changes: Vec<String> = written.map(|e| e.to_string()).collect();
    assert!(changes.iter().any(|c| c.contains("write /srv/in/up")), "{changes:?}");
    assert!(changes.iter().any(|c| c.contains("remove /srv/d")), "{changes:?}");
    assert!(!house.log().contains("/srv/in"), "paths are not logged");
    let stop = curl(&house, &top, &format!("-X POST {API}/v1/instances/{child}/stop"));
    assert_eq!(stop.0, 200);
    denied(&curl(&house, &top, &format!("'{files}?path=/srv'")), 409, "instance_state", "");
}
