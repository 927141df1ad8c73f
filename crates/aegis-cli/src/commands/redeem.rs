//! `aegis redeem`: what a guest does with a code.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use hyper::Method;
use serde_json::{Value, json};

use super::guest::status_fields;
use super::invite::{limits, permissions};
use super::{Ask, maybe, text, when};
use crate::failure::{Failure, Result};
use crate::output::{Work, fields};

/// How often a guest asks whether its machine runs: it has no stream of events to wait on.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// The first time sooner: where a spare machine waits, it runs within this.
const ASK_SOON: Duration = Duration::from_millis(30);
/// How long `--wait` waits.
const WAIT_DEADLINE: Duration = Duration::from_secs(300);
/// Tries of one redeem when the connection breaks; they are one redeem by their key.
const TRIES: u32 = 3;
/// Largest public key file, bytes.
const KEY_FILE_MAX: u64 = 16 * 1024;

/// What `aegis redeem` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
A code can be redeemed once. The answer holds the guest's token: keep it, it is shown only here.

Examples:
  aegis redeem inv_… --name ty --wait
  aegis --url http://127.0.0.1:3000 redeem inv_… --name ty
  echo inv_… | aegis redeem - --name ty --json | jq -r .authToken")]
pub struct RedeemArgs {
    /// The code, or - to read it from stdin
    code: String,
    /// The guest's name
    #[arg(long, value_name = "NAME")]
    name: String,
    /// File with an OpenSSH public key
    #[arg(long, value_name = "FILE")]
    public_key_file: Option<PathBuf>,
    /// Wait until the machine runs
    #[arg(long)]
    wait: bool,
}

/// Redeems.
pub async fn redeem(ask: &Ask, args: RedeemArgs) -> Result<()> {
    let code = match args.code.as_str() {
        "-" => {
            let mut line = String::new();
            std::io::stdin()
                .read_line(&mut line)
                .map_err(|e| Failure::because("cannot read the code from stdin", e))?;
            line.trim().to_owned()
        }
        code => code.to_owned(),
    };
    let mut body = json!({ "code": code, "name": args.name });
    if let Some(path) = &args.public_key_file {
        body["publicKey"] = read_key(path)?.into();
    }
    let redeemed = redeem_once(ask, body).await?;
    if !args.wait {
        return ask.format.answer(&redeemed, || redeemed_fields(&redeemed));
    }
    let status = wait(ask, &redeemed).await?;
    ask.format.answer(&json!({ "redeemed": redeemed, "status": status }), || {
        let token = fields(&[("Token", text(&redeemed, "authToken"))]);
        token + &status_fields(&status)
    })
}

fn read_key(path: &std::path::Path) -> Result<String> {
    use std::io::Read as _;
    let mut key = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(KEY_FILE_MAX).read_to_string(&mut key))
        .map_err(|e| Failure::file("read", path, e))?;
    Ok(key.trim().to_owned())
}

/// A redeem whose answer got lost would have spent the code for nothing, so it is tried again
/// under the same key, which makes it the same redeem.
async fn redeem_once(ask: &Ask, body: Value) -> Result<Value> {
    let mut random = [0u8; 16];
    getrandom::fill(&mut random)
        .map_err(|e| Failure::here(format!("the system gives no random bytes: {e}")))?;
    let key: String = random.iter().map(|b| format!("{b:02x}")).collect();
    let mut tries = 0;
    loop {
        tries += 1;
        let headers = [("idempotency-key", key.as_str())];
        match ask.client.ask(Method::POST, "/couch/redeem", Some(body.clone()), &headers).await {
            Err(Failure::Here { .. }) if tries < TRIES => {}
            other => return other,
        }
    }
}

async fn wait(ask: &Ask, redeemed: &Value) -> Result<Value> {
    let guest = ask.client.as_guest(&text(redeemed, "authToken"));
    let mut work = Work::begin("machine", "provisioning");
    let mut pause = ASK_SOON;
    let running = async {
        loop {
            let status = guest.get("/couch/status").await?;
            if text(&status, "status") != "provisioning" {
                return Ok(status);
            }
            let problem = maybe(&status, "provisionError");
            if !problem.is_empty() {
                work.now(&format!("provisioning; the last try failed: {problem}"));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(ASK_AGAIN);
        }
    };
    match tokio::time::timeout(WAIT_DEADLINE, running).await {
        Ok(Ok(status)) => {
            work.done(&text(&status, "status"));
            Ok(status)
        }
        Ok(Err(failure)) => Err(failure),
        Err(_) => Err(Failure::here(format!(
            "the machine does not run yet; the guest is {}, its token is {}",
            text(redeemed, "guestId"),
            text(redeemed, "authToken")
        ))
        .fix("the host sees why: aegis guest status ID")),
    }
}

fn redeemed_fields(redeemed: &Value) -> String {
    fields(&[
        ("Guest", text(redeemed, "guestId")),
        ("Token", text(redeemed, "authToken")),
        ("Status", text(redeemed, "status")),
        ("Agent", maybe(redeemed, "agentEndpoint")),
        ("Limits", limits(redeemed)),
        ("May", permissions(redeemed)),
        ("Expires", when(redeemed, "expiresAt")),
    ])
}
