//! A real registry on loopback, and a server before it that cuts, bends and asks for tokens.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aegis_images::digest::Digest;
use aegis_wire::images::{Credentials, Pull, Source};
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use serde_json::json;
use tempfile::TempDir;

use crate::support::Image;

/// `me` and `hush`, as the registry keeps them.
const HTPASSWD: &str = "me:$2y$04$gZ7jmMN1FWb08DMVvAd8B.pzcDX2NLqunpGGHrHyiDXvPN3KrFqf2\n";
pub const USER: &str = "me";
pub const PASSWORD: &str = "hush";
/// What the token server gives.
const TOKEN: &str = "a-token-of-the-test";

/// Debian's `docker-registry`; gone with this value.
pub struct Registry {
    pub address: SocketAddr,
    child: Child,
    _dir: TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    pub fn start(auth: bool) -> Registry {
        let dir = tempfile::tempdir().unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let users = dir.path().join("users");
        fs::write(&users, HTPASSWD).unwrap();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '{address}'}}\n",
            dir.path().join("data").display()
        );
        if auth {
            config += &format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", users.display());
        }
        let file = dir.path().join("config.yml");
        fs::write(&file, config).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed (packaging/tools.sh)");
        let registry = Registry { address, child, _dir: dir };
        let until = Instant::now() + Duration::from_secs(20);
        // It says nothing when it listens; there is nothing else to wait for.
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < until, "the registry does not listen");
            std::thread::yield_now();
        }
        registry
    }

    /// Puts an image there, under a tag.
    pub fn push(&self, name: &str, image: &Image, auth: bool) {
        let reference: Reference = format!("{}/{name}", self.address).parse().unwrap();
        self.with(&reference, auth, |client, reference| async move {
            for (digest, bytes) in &image.blobs {
                client.push_blob(&reference, bytes.clone(), digest.as_str()).await.unwrap();
            }
            let kind = "application/vnd.oci.image.manifest.v1+json".parse().unwrap();
            client.push_manifest_raw(&reference, image.manifest.clone(), kind).await.unwrap();
        });
    }

    /// Puts a list of this image, and of one for another processor, there.
    pub fn push_index(&self, name: &str, image: &Image) -> Digest {
        let entry = |digest: &Digest, size, architecture| {
            json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": size,
                "digest": digest, "platform": { "os": "linux", "architecture": architecture } })
        };
        let other = Image::new(&[], crate::support::gzip, json!({ "Cmd": ["other"] }));
        self.push(&format!("{}:other", name.split(':').next().unwrap()), &other, false);
        let index = json!({ "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [
                entry(&other.digest(), other.manifest.len(), "arm64"),
                entry(&image.digest(), image.manifest.len(), "amd64"),
            ] })
        .to_string()
        .into_bytes();
        let digest = Digest::of_bytes(&index);
        let reference: Reference = format!("{}/{name}", self.address).parse().unwrap();
        self.with(&reference, false, |client, reference| async move {
            let kind = "application/vnd.oci.image.index.v1+json".parse().unwrap();
            client.push_manifest_raw(&reference, index, kind).await.unwrap();
        });
        digest
    }

    fn with<F: Future<Output = ()>>(
        &self,
        reference: &Reference,
        auth: bool,
        work: impl FnOnce(Client, Reference) -> F,
    ) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() };
        let client = Client::try_from(config).unwrap();
        let who = match auth {
            true => RegistryAuth::Basic(USER.to_owned(), PASSWORD.to_owned()),
            false => RegistryAuth::Anonymous,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            client.auth(reference, &who, RegistryOperation::Push).await.unwrap();
            work(client, reference.clone()).await;
        });
    }
}

/// A pull from an address.
pub fn pull(address: SocketAddr, name: &str, credentials: Option<(&str, &str)>) -> Pull {
    let (name, digest) = match name.split_once('@') {
        Some((name, digest)) => (name, Some(digest.to_owned())),
        None => (name, None),
    };
    let (repository, tag) = name.split_once(':').map_or((name, None), |(n, t)| (n, Some(t)));
    Pull {
        registry: address.to_string(),
        repository: repository.to_owned(),
        tag: tag.map(str::to_owned),
        digest,
        sources: vec![source(address, credentials)],
    }
}

pub fn source(address: SocketAddr, credentials: Option<(&str, &str)>) -> Source {
    let credentials = credentials.map(|(username, password)| Credentials {
        username: username.to_owned(),
        password: password.to_owned(),
    });
    Source { host: address.to_string(), plain: true, credentials }
}

/// What the server before a registry does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Trick {
    /// Nothing.
    None,
    /// Ends each blob after so many bytes.
    Cut(usize),
    /// Turns a bit in each large blob.
    Bend,
    /// Turns a space in each manifest into a tab, which means the same.
    Reword,
    /// Wants a token, which another path gives.
    Tokens,
}

/// A server before a registry.
pub struct Front {
    pub address: SocketAddr,
    trick: Arc<Mutex<Trick>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Front {
    pub fn start(to: SocketAddr, trick: Trick) -> Front {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let front = Front { address, trick: Arc::new(Mutex::new(trick)), asked: Arc::default() };
        let (trick, asked) = (Arc::clone(&front.trick), Arc::clone(&front.asked));
        // It ends with the process.
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (trick, asked) = (Arc::clone(&trick), Arc::clone(&asked));
                std::thread::spawn(move || {
                    let trick = *trick.lock().unwrap();
                    let _ = serve(client, to, address, trick, &asked);
                });
            }
        });
        front
    }

    pub fn now(&self, trick: Trick) {
        *self.trick.lock().unwrap() = trick;
    }

    /// Heads of all requests so far that contain this; and forgets all.
    pub fn asked(&self, what: &str) -> Vec<String> {
        let all = std::mem::take(&mut *self.asked.lock().unwrap());
        all.into_iter().filter(|head| head.contains(what)).collect()
    }
}

fn head(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        from.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(head)
}

fn serve(
    mut client: TcpStream,
    to: SocketAddr,
    own: SocketAddr,
    trick: Trick,
    asked: &Mutex<Vec<String>>,
) -> io::Result<()> {
    let request = String::from_utf8_lossy(&head(&mut client)?).into_owned();
    asked.lock().unwrap().push(request.clone());
    let lower = request.to_lowercase();
    if trick == Trick::Tokens {
        let answer = |status: &str, more: &str, body: &str| {
            format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n{more}\r\n{body}",
                body.len()
            )
        };
        if request.starts_with("GET /token") {
            // `me:hush`
            let known = lower.contains("authorization: basic bwu6ahvzaa==");
            let body = json!({ "token": TOKEN }).to_string();
            let answer = if known { answer("200 OK", "", &body) } else { answer("401 No", "", "") };
            return client.write_all(answer.as_bytes());
        }
        if !lower.contains(&format!("authorization: bearer {TOKEN}")) {
            let more = format!(
                "www-authenticate: Bearer realm=\"http://{own}/token\",service=\"test\"\r\n"
            );
            return client.write_all(answer("401 Unauthorized", &more, "").as_bytes());
        }
    }
    let lines = request.trim_end().lines().filter(|line| {
        let line = line.to_lowercase();
        !line.starts_with("connection:") && !line.starts_with("authorization: bearer")
    });
    let passed = lines.collect::<Vec<_>>().join("\r\n") + "\r\nConnection: close\r\n\r\n";
    let mut upstream = TcpStream::connect(to)?;
    upstream.write_all(passed.as_bytes())?;
    let answer = head(&mut upstream)?;
    let mut body = Vec::new();
    upstream.read_to_end(&mut body)?;
    match trick {
        Trick::Cut(bytes) if request.contains("/blobs/") => body.truncate(bytes),
        Trick::Bend if request.contains("/blobs/") && body.len() > 10_000 => body[5000] ^= 1,
        Trick::Reword if request.contains("/manifests/") => {
            if let Some(at) = body.iter().position(|b| *b == b':') {
                body[at - 1] ^= 1;
            }
        }
        _ => {}
    }
    client.write_all(&answer)?;
    client.write_all(&body)
}
