"""What programs do with files, in the directory that is named; run inside of a machine."""
import ctypes, errno, fcntl, mmap, os, sqlite3, struct, subprocess, sys

os.chdir(sys.argv[1])


def write(name, text, mode="w"):
    with open(name, mode) as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def read(name):
    with open(name) as f:
        return f.read()


# Many small files, as of packages.
os.mkdir("many")
for i in range(2000):
    with open(f"many/{i}", "w") as f:
        f.write(str(i))
assert sorted(map(int, os.listdir("many"))) == list(range(2000))
assert all(read(f"many/{i}") == str(i) for i in range(0, 2000, 37))

# Written beside, and renamed over.
for i in range(20):
    write("config.new", f"version {i}")
    os.rename("config.new", "config")
    assert read("config") == f"version {i}"

# Removed while it is open.
f = open("gone", "w+")
f.write("still here")
f.flush()
os.unlink("gone")
assert not os.path.exists("gone")
f.seek(0)
assert f.read() == "still here" and os.fstat(f.fileno()).st_nlink == 0
f.close()

# Two processes append.
append = "import os,sys\nfd=os.open('appended',os.O_WRONLY|os.O_APPEND|os.O_CREAT)\n" \
         "for i in range(200): os.write(fd,f'{sys.argv[1]} {i}\\n'.encode())"
both = [subprocess.Popen([sys.executable, "-c", append, name]) for name in "ab"]
assert [p.wait() for p in both] == [0, 0]
lines = read("appended").splitlines()
for name in "ab":
    assert [l for l in lines if l[0] == name] == [f"{name} {i}" for i in range(200)]

# Links inside.
os.symlink("config", "link")
os.link("config", "hard")
write("link", "through the link")
assert read("hard") == "through the link" and os.stat("hard").st_nlink == 2

# Locks hold between processes.
with open("lock", "w") as f:
    fcntl.lockf(f, fcntl.LOCK_EX)
    other = "import fcntl\nfcntl.lockf(open('lock','w'),fcntl.LOCK_EX|fcntl.LOCK_NB)"
    assert subprocess.run([sys.executable, "-c", other], stderr=subprocess.DEVNULL).returncode != 0
assert subprocess.run([sys.executable, "-c", other]).returncode == 0

# A mapping that is shared.
with open("mapped", "w+b") as f:
    f.truncate(8192)
    with mmap.mmap(f.fileno(), 8192) as m:
        m[4096:4101] = b"in it"
        m.flush()
with open("mapped", "rb") as f:
    assert f.read()[4096:4101] == b"in it"

# A database, with both kinds of journal, and two processes in it.
for journal in ["delete", "wal"]:
    name = f"{journal}.db"
    db = sqlite3.connect(name, timeout=60)
    assert db.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
    db.execute("create table t (n integer)")
    db.commit()
    insert = "import sqlite3,sys\ndb=sqlite3.connect(sys.argv[1],timeout=60)\n" \
             "for i in range(10):\n  db.execute('insert into t values (?)',(i,)); db.commit()"
    both = [subprocess.Popen([sys.executable, "-c", insert, name]) for _ in "ab"]
    assert [p.wait() for p in both] == [0, 0]
    assert db.execute("select count(*), sum(n) from t").fetchone() == (20, 90)
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    db.close()

# News of what this machine changes.
libc = ctypes.CDLL(None, use_errno=True)
news = libc.inotify_init()
os.mkdir("watched")
assert libc.inotify_add_watch(news, b"watched", 0x100) > 0
write("watched/new", "x")
event = os.read(news, 4096)
assert event[16:].rstrip(b"\0") == b"new", event

# Holes, and room that is taken before.
with open("sparse", "w+b") as f:
    f.truncate(1 << 40)
    assert os.stat("sparse").st_blocks == 0
    os.posix_fallocate(f.fileno(), 0, 1 << 16)
    assert os.stat("sparse").st_blocks >= 128

# An owner is taken and means nothing; other attributes there are none.
os.chown("config", 1234, 1234)
assert os.stat("config").st_uid == 0
try:
    os.setxattr("config", "security.x", b"1")
    raise AssertionError("an attribute")
except OSError as e:
    assert e.errno == errno.EOPNOTSUPP, e
os.utime("config", (1, 2))
assert os.stat("config").st_mtime == 2
print("all is well")
