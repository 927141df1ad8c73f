//! The host's secrets: no tree's, and sealed before they come here. What is written of them is noted in
//! the host's own chain, without the value.

use aegis_rules::audit::{Note, Subject};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::bounds::SECRETS_KEPT_MAX;
use aegis_wire::egress::HostName;
use aegis_wire::words::{SecretName, Time, Tree};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::tally::Written;
use super::{Error, Facts, Ledger, WriteError, store};
use crate::keys::Sealed;

/// A secret as it is kept.
#[derive(Clone)]
pub struct StoredSecret {
    /// Its name.
    pub name: SecretName,
    /// Where its placeholder stands for it; `None` where machines get it as it is.
    pub hosts: Option<Vec<HostName>>,
    /// When it was set.
    pub updated_at: Time,
    /// The value, sealed.
    pub sealed: Sealed,
}

const COLUMNS: &str = "SELECT name, nonce, sealed, proxy, hosts, updated_at FROM secret";

fn read(row: &Row<'_>) -> Result<StoredSecret, Error> {
    let name: String = row.get("name")?;
    let damaged = |what: String| Error::Damaged { table: "secret", id: name.clone(), what };
    let proxy: bool = row.get("proxy")?;
    let hosts: String = row.get("hosts")?;
    let hosts: Vec<String> = serde_json::from_str(&hosts).map_err(|e| damaged(e.to_string()))?;
    let hosts: Result<Vec<HostName>, _> = hosts.iter().map(|h| h.parse()).collect();
    let hosts = hosts.map_err(|e| damaged(e.to_string()))?;
    Ok(StoredSecret {
        name: name.parse().map_err(|_| damaged("its name is none".to_owned()))?,
        hosts: proxy.then_some(hosts),
        updated_at: Time(row.get("updated_at")?),
        sealed: Sealed { nonce: row.get("nonce")?, bytes: row.get("sealed")? },
    })
}

impl Facts<'_> {
    /// One secret.
    pub fn secret(&self, name: &SecretName) -> Result<Option<StoredSecret>, Error> {
        let sql = format!("{COLUMNS} WHERE name = ?1");
        let mut statement = self.connection.prepare_cached(&sql)?;
        let mut rows = statement.query([name.as_str()])?;
        rows.next()?.map(read).transpose()
    }

    /// All secrets, by name.
    pub fn secrets(&self) -> Result<Vec<StoredSecret>, Error> {
        let mut statement = self.connection.prepare_cached(&format!("{COLUMNS} ORDER BY name"))?;
        let mut rows = statement.query([])?;
        let mut all = Vec::new();
        while let Some(row) = rows.next()? {
            all.push(read(row)?);
        }
        Ok(all)
    }
}

fn note(
    connection: &Connection,
    actor: &str,
    kind: &'static str,
    name: &SecretName,
    data: Vec<(&'static str, String)>,
    at: Time,
) -> Result<(), Error> {
    let note = Note { kind, subject: Subject::Secret(name.clone()), data };
    store::append_note(connection, &Tree::Host, actor, note, Some(at))
}

impl Ledger {
    /// Keeps a secret, in the place of an earlier one of its name.
    ///
    /// # Errors
    /// A refusal where there are too many already.
    pub async fn keep_secret(&self, actor: &str, secret: StoredSecret) -> Result<(), WriteError> {
        let actor = actor.to_owned();
        self.run(move |connection| {
            let StoredSecret { name, hosts, updated_at, sealed } = secret;
            let others: u64 = connection
                .prepare_cached("SELECT count(*) FROM secret WHERE name <> ?1")?
                .query_row([name.as_str()], |r| r.get(0))?;
            if others >= SECRETS_KEPT_MAX as u64 {
                let message = format!("this host keeps {SECRETS_KEPT_MAX} secrets already");
                let refusal = Refusal::new(Code::NoCapacity, message);
                return Err(refusal.hint("delete one that nobody needs").into());
            }
            let listed: Vec<&str> = hosts.iter().flatten().map(HostName::as_str).collect();
            let json = serde_json::to_string(&listed).map_err(|e| Error::Commit(e.to_string()))?;
            connection
                .prepare_cached(
                    "INSERT INTO secret (name, nonce, sealed, proxy, hosts, updated_at)
                     VALUES (?1,?2,?3,?4,?5,?6)
                     ON CONFLICT (name) DO UPDATE SET nonce = ?2, sealed = ?3, proxy = ?4,
                                                      hosts = ?5, updated_at = ?6",
                )?
                .execute(params![
                    name.as_str(),
                    sealed.nonce,
                    sealed.bytes,
                    hosts.is_some(),
                    json,
                    updated_at.0,
                ])?;
            let mut data = vec![("proxy", hosts.is_some().to_string())];
            if hosts.is_some() {
                data.push(("hosts", listed.join(",")));
            }
            note(connection, &actor, "secret.set", &name, data, updated_at)?;
            Ok(((), Written::default()))
        })
        .await
    }

    /// Forgets a secret; says whether there was one.
    pub async fn forget_secret(
        &self,
        actor: &str,
        name: SecretName,
        at: Time,
    ) -> Result<bool, WriteError> {
        let actor = actor.to_owned();
        self.run(move |connection| {
            let gone = connection
                .prepare_cached("DELETE FROM secret WHERE name = ?1 RETURNING name")?
                .query_row([name.as_str()], |_| Ok(()))
                .optional()?;
            if gone.is_some() {
                note(connection, &actor, "secret.deleted", &name, vec![], at)?;
            }
            Ok((gone.is_some(), Written::default()))
        })
        .await
    }
}
