//! Files of machines that are lent, in one piece each.

use std::io;

use aegis_rules::refusal::Refusal;
use aegis_wire::channel::files::{FileAsk, FilePath, Make, Mode};
use aegis_wire::vers::{FILE_MAX, PutFile};
use aegis_wire::words::Uuid;
use axum::body::Bytes;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::super::{App, Error, Host, files};
use super::find;

fn path(text: &str) -> Result<FilePath, Refusal> {
    FilePath::try_from(text.as_bytes().to_vec())
        .map_err(|_| Refusal::field("path", "an absolute path"))
}

/// Reads a file.
pub async fn read_file(host: Host, app: &App, vm: &Uuid, at: &str) -> Result<Vec<u8>, Error> {
    let instance = find(host, app, vm)?;
    let ask = FileAsk::Read { path: path(at)?, from: 0, length: None };
    let open = files::ask(host, app, instance.id.as_str(), ask).await?;
    let too_large = || {
        Refusal::field("path", format!("a file of at most {FILE_MAX} bytes; read parts by exec"))
    };
    if open.sends()?.and_then(|sends| sends.length).is_some_and(|n| n > FILE_MAX as u64) {
        return Err(too_large().into());
    }
    let mut body = open.body()?;
    let mut bytes = Vec::new();
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|_| Error::Machine("the machine broke off".to_owned()))?;
        bytes.extend_from_slice(&piece);
        // What the machine said of it does not bind it.
        if bytes.len() > FILE_MAX {
            return Err(too_large().into());
        }
    }
    Ok(bytes)
}

/// Writes a file, whole or not at all.
pub async fn write_file(host: Host, app: &App, vm: &Uuid, ask: PutFile) -> Result<(), Error> {
    let instance = find(host, app, vm)?;
    let bytes = STANDARD.decode(&ask.content_b64);
    let bytes = bytes.map_err(|_| Refusal::field("content_b64", "base64"))?;
    let mode = ask.mode.map(Mode::try_from).transpose();
    let make = Make {
        mode: mode.map_err(|_| Refusal::field("mode", "permissions, from 0 to 4095"))?,
        create_dirs: ask.create_dirs.unwrap_or(false),
        ..Make::default()
    };
    let ask = FileAsk::Write { path: path(&ask.path)?, size: Some(bytes.len() as u64), make };
    let open = files::ask(host, app, instance.id.as_str(), ask).await?;
    let whole = futures_util::stream::iter([Ok::<_, io::Error>(Bytes::from(bytes))]);
    open.write(whole).await.map(drop)
}
