//! `[vers]`: the account in the vers cloud, and how patient we are with it.

use std::path::PathBuf;
use std::time::Duration;

use aegis_vers::{ApiKey, VmDomain, client};
use aegis_wire::words::{DurationMs, Uuid, is_loopback};
use serde::Deserialize;

use super::{BadConfig, ProvisionerKind, bad};

/// The cloud itself.
const BASE_URL: &str = "https://api.vers.sh";
/// The longest that any of the times below may be, seconds.
const SECS_MAX: u64 = 3600;

/// The account, and how patient we are.
#[derive(Clone, Debug)]
pub struct Vers {
    /// Without a slash at the end.
    pub base_url: String,
    /// The domain of its machines.
    pub domain: VmDomain,
    /// The key, or where it is.
    pub key: VersKey,
    /// The commit that guests' machines come from where their invite names none.
    pub golden: Option<Uuid>,
    /// How long requests may take.
    pub deadlines: client::Deadlines,
    /// So long after a create began whose answer is not clear, it may still make a machine.
    pub within: DurationMs,
    /// How often a machine that runs is looked at.
    pub poll: Duration,
    /// A machine is up within this.
    pub boot: Duration,
    /// How often machines are looked for that are ours and nobody's.
    pub sweep: Duration,
}

/// A key, or where it is.
#[derive(Clone, Debug)]
pub enum VersKey {
    /// From `VERS_API_KEY`.
    Given(ApiKey),
    /// From a file that only we can read.
    File(PathBuf),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Section {
    base_url: Option<String>,
    vm_domain: Option<String>,
    api_key_file: Option<PathBuf>,
    golden_commit: Option<String>,
    create_timeout_secs: Option<u64>,
    timeout_secs: Option<u64>,
    settle_secs: Option<u64>,
    poll_secs: Option<u64>,
    boot_secs: Option<u64>,
    sweep_secs: Option<u64>,
}

/// `[vers_api]`: being such a cloud for others.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ApiSection {
    #[serde(default)]
    pub(super) enabled: bool,
}

/// Reads the section; `None` where no key is named, so that there is no account.
pub(super) fn read(
    said: Section,
    var: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<Vers>, BadConfig> {
    let key = match (var("VERS_API_KEY"), said.api_key_file) {
        (Some(text), _) => VersKey::Given(text.parse().map_err(|e| bad("VERS_API_KEY", e))?),
        (None, Some(path)) => VersKey::File(path),
        (None, None) => return Ok(None),
    };
    let url = var("VERS_BASE_URL").or(said.base_url).unwrap_or_else(|| BASE_URL.to_owned());
    let (base_url, host) = client::base(&url).map_err(|e| bad("vers.base_url", e))?;
    if base_url.starts_with("http://") && !is_loopback(&host) {
        let why = "must be https:// but on loopback: the key goes with every request";
        return Err(bad("vers.base_url", why));
    }
    let domain = match said.vm_domain {
        Some(text) => text.parse().map_err(|e| bad("vers.vm_domain", e))?,
        None => VmDomain::of_api(&host),
    };
    let golden = var("GOLDEN_COMMIT_ID").or(said.golden_commit);
    let golden = golden
        .map(|text| text.to_ascii_lowercase().parse())
        .transpose()
        .map_err(|e| bad("vers.golden_commit or GOLDEN_COMMIT_ID", e))?;
    let seconds = |name: &str, said: Option<u64>, usual: u64| match said.unwrap_or(usual) {
        seconds @ 1..=SECS_MAX => Ok(Duration::from_secs(seconds)),
        _ => Err(bad(&format!("vers.{name}"), format!("must be from 1 to {SECS_MAX}"))),
    };
    let create = seconds("create_timeout_secs", said.create_timeout_secs, 60)?;
    let settle = seconds("settle_secs", said.settle_secs, 30)?;
    let within = u64::try_from((create + settle).as_millis()).unwrap_or(u64::MAX);
    Ok(Some(Vers {
        base_url,
        domain,
        key,
        golden,
        deadlines: client::Deadlines {
            create,
            other: seconds("timeout_secs", said.timeout_secs, 20)?,
        },
        within: DurationMs(within),
        poll: seconds("poll_secs", said.poll_secs, 10)?,
        boot: seconds("boot_secs", said.boot_secs, 120)?,
        sweep: seconds("sweep_secs", said.sweep_secs, 60)?,
    }))
}

/// Refuses a provisioner that has no account.
pub(super) fn check(provisioner: ProvisionerKind, vers: Option<&Vers>) -> Result<(), BadConfig> {
    let missing = |what: &str| Err(bad("provisioner", format!("vers needs {what}")));
    match (provisioner, vers) {
        (ProvisionerKind::Vers, None) => missing("VERS_API_KEY, or api_key_file in [vers]"),
        (ProvisionerKind::Vers, Some(vers)) if vers.golden.is_none() => {
            missing("GOLDEN_COMMIT_ID, or golden_commit in [vers]")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0B9CF0AD-8d4e-4a4b-9c4b-3f3d1f0a6a01";

    fn of(text: &str, env: &[(&str, &str)]) -> Result<Option<Vers>, BadConfig> {
        let var =
            |name: &str| env.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        read(toml::from_str(text).map_err(|e| bad("aegis.toml", e))?, &var)
    }

    #[test]
    fn an_account_is_a_key_and_the_rest_has_defaults() {
        assert!(of("", &[]).unwrap().is_none());
        let vers = of("api_key_file = '/x'", &[("GOLDEN_COMMIT_ID", COMMIT)]).unwrap().unwrap();
        assert_eq!(vers.base_url, BASE_URL);
        assert_eq!(vers.domain.to_string(), "vm.vers.sh");
        assert_eq!(vers.golden.unwrap().as_str(), COMMIT.to_ascii_lowercase());
        assert_eq!(vers.within, DurationMs(90_000));
        let none = of("api_key_file = '/x'", &[]).unwrap();
        assert!(check(ProvisionerKind::Vers, none.as_ref()).is_err(), "no commit");
        assert!(check(ProvisionerKind::Vers, None).is_err(), "no key");
        assert!(check(ProvisionerKind::Local, None).is_ok());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let key = format!("{}{}", COMMIT, "0".repeat(64));
        let with = |text: &str| of(text, &[("VERS_API_KEY", &key)]);
        assert!(with("base_url = 'http://127.0.0.1:1'").is_ok());
        for (text, setting) in [
            ("base_url = 'http://vers.test'", "vers.base_url"),
            ("base_url = 'vers.test'", "vers.base_url"),
            ("vm_domain = '/'", "vers.vm_domain"),
            ("golden_commit = 'x'", "vers.golden_commit or GOLDEN_COMMIT_ID"),
            ("settle_secs = 0", "vers.settle_secs"),
            ("api_key = 'x'", "aegis.toml"),
        ] {
            assert_eq!(with(text).unwrap_err().setting, setting, "{text}");
        }
        let wrong = of("", &[("VERS_API_KEY", "secret-words")]).unwrap_err();
        assert_eq!(wrong.setting, "VERS_API_KEY");
        assert!(!wrong.problem.contains("secret-words"));
    }
}
