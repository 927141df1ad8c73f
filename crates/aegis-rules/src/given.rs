//! What an instance is given besides its machine: secrets, host services, models of the LLM door, a folder
//! (contracts/couch.md 6).
//!
//! Names only. What a name stands for is looked up when it is needed, and what is not there then is
//! not given. Services and models hold downwards: whatever stands in a child's own record, it gets
//! nothing that one above it has not.

use crate::capability::glob::Glob;
use crate::egress::{HostName, ServiceName};
use crate::instance::{Instance, ancestors, find};
use crate::refusal::Refusal;
use crate::words::{InstanceId, SecretName};

/// Secrets that one instance names.
pub const SECRETS_MAX: usize = 32;
/// Host services that one instance names.
pub const SERVICES_MAX: usize = 32;
/// Patterns of models in one list, and bytes of one.
pub const MODELS_MAX: (usize, usize) = (64, 200);

/// Which secrets an instance gets at its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Secrets {
    /// These.
    Named(Vec<SecretName>),
    /// All that the host keeps then.
    All,
}

impl Default for Secrets {
    fn default() -> Secrets {
        Secrets::Named(Vec::new())
    }
}

impl Secrets {
    /// From names as they are asked for; `*` alone is all.
    ///
    /// # Errors
    /// A refusal of the field `secrets`.
    pub fn parse(texts: &[String]) -> Result<Secrets, Refusal> {
        if texts == ["*"] {
            return Ok(Secrets::All);
        }
        let bad = || {
            let name = "names of 1 to 64 of A-Z 0-9 _";
            Refusal::field("secrets", format!("at most {SECRETS_MAX} {name}, or [\"*\"] alone"))
        };
        if texts.len() > SECRETS_MAX {
            return Err(bad());
        }
        let mut names = Vec::with_capacity(texts.len());
        for text in texts {
            let name: SecretName = text.parse().map_err(|_| bad())?;
            if !names.contains(&name) {
                names.push(name);
            }
        }
        Ok(Secrets::Named(names))
    }

    /// As they are asked for.
    pub fn texts(&self) -> Vec<String> {
        match self {
            Secrets::Named(names) => names.iter().map(ToString::to_string).collect(),
            Secrets::All => vec!["*".to_owned()],
        }
    }

    /// Whether a secret is among them.
    pub fn have(&self, name: &SecretName) -> bool {
        match self {
            Secrets::Named(names) => names.contains(name),
            Secrets::All => true,
        }
    }

    /// The first that is asked for by name and not among those that are kept.
    pub fn missing(&self, kept: impl Fn(&SecretName) -> bool) -> Option<&SecretName> {
        match self {
            Secrets::Named(names) => names.iter().find(|name| !kept(name)),
            Secrets::All => None,
        }
    }
}

/// What an instance is given. The default is nothing of the host; of the LLM door it is what each
/// provider of the host offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Secrets.
    pub secrets: Secrets,
    /// Host services.
    pub services: Vec<ServiceName>,
    /// Models, as patterns; absent is what the providers offer, empty is none.
    pub models: Option<Models>,
    /// The folder that is its workspace.
    pub workspace: Option<Folder>,
}

/// A folder of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    /// Its path after all links.
    pub path: String,
    /// Nothing can be changed in it.
    pub read_only: bool,
}

/// Patterns of models, in which `*` stands for any text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Models(Vec<String>);

impl Models {
    /// From a list of patterns.
    ///
    /// # Errors
    /// A refusal of this field.
    pub fn parse(texts: Vec<String>, field: &str) -> Result<Models, Refusal> {
        let (most, bytes) = MODELS_MAX;
        let fine =
            |t: &String| !t.is_empty() && t.len() <= bytes && !t.chars().any(char::is_control);
        if texts.len() > most || !texts.iter().all(fine) {
            let allowed = "names of models of 1 to";
            return Err(Refusal::field(
                field,
                format!("at most {most} {allowed} {bytes} bytes, in which * stands for any text"),
            ));
        }
        Ok(Models(texts))
    }

    /// As they were written.
    pub fn texts(&self) -> &[String] {
        &self.0
    }

    /// Whether a model is one of them.
    pub fn admit(&self, model: &str) -> bool {
        let model = Glob::literal(model);
        // A model's name may hold slashes, and a star stands for those too.
        self.0.iter().any(|pattern| Glob::new(&pattern.replace('*', "**")).covers(&model))
    }
}

/// What a child is given of its parent's services: all, or those that are asked for.
///
/// # Errors
/// A denial that names the first one which the parent does not have.
pub fn services_of_child(
    parent: &Given,
    asked: Option<Vec<ServiceName>>,
) -> Result<Vec<ServiceName>, Refusal> {
    let Some(asked) = asked else { return Ok(parent.services.clone()) };
    match asked.iter().find(|name| !parent.services.contains(name)) {
        None => Ok(asked),
        Some(name) => {
            let listed: Vec<&str> = parent.services.iter().map(ServiceName::as_str).collect();
            let allowed = if listed.is_empty() { "none".to_owned() } else { listed.join(", ") };
            let message = format!("this instance may not use the host service {name} itself");
            Err(Refusal::denied("host_services", message)
                .amounts(name.as_str(), allowed)
                .hint("leave it out"))
        }
    }
}

/// The host services that an instance may use: those that it and all above it were given, as far as
/// the host has them. `family` are all records of its tree.
pub fn services<'a>(
    family: &[Instance],
    id: &InstanceId,
    host: impl IntoIterator<Item = &'a ServiceName>,
) -> Vec<ServiceName> {
    let known = ancestors(family, id).next().is_some();
    let all_have = |name: &ServiceName| {
        ancestors(family, id).all(|above| above.spec.given.services.contains(name))
    };
    host.into_iter().filter(|name| known && all_have(name)).cloned().collect()
}

/// Whether an instance may use a model, as far as it and all above it go.
pub fn may_use(family: &[Instance], id: &InstanceId, model: &str) -> bool {
    let mut line = ancestors(family, id).peekable();
    line.peek().is_some()
        && line.all(|above| above.spec.given.models.as_ref().is_none_or(|m| m.admit(model)))
}

/// Whether there is an LLM door for an instance: where it, or one above it, was given no model at
/// all, there is none.
pub fn has_llm(family: &[Instance], id: &InstanceId) -> bool {
    let mut line = ancestors(family, id).peekable();
    line.peek().is_some()
        && line.all(|above| above.spec.given.models.as_ref().is_none_or(|m| !m.0.is_empty()))
}

/// What of its host an instance may reach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Host services.
    pub services: Vec<ServiceName>,
    /// Whether there is an LLM door.
    pub llm: bool,
    /// Hosts at which one of its placeholders stands for a secret: plain HTTP to them goes through
    /// the hatch.
    pub via_hatch: Vec<HostName>,
}

/// What of its host an instance may reach. `host` are the host's services, `secrets` its proxy
/// secrets with their hosts; `family` are all records of its tree.
pub fn reach<'a>(
    family: &[Instance],
    id: &InstanceId,
    host: impl IntoIterator<Item = &'a ServiceName>,
    has_providers: bool,
    secrets: &[(SecretName, Vec<HostName>)],
) -> Reach {
    let own = find(family, id).map(|i| &i.spec.given.secrets);
    let mut via_hatch: Vec<HostName> = secrets
        .iter()
        .filter(|(name, _)| own.is_some_and(|own| own.have(name)))
        .flat_map(|(_, hosts)| hosts.iter().cloned())
        .collect();
    via_hatch.sort();
    via_hatch.dedup();
    let llm = has_providers && has_llm(family, id);
    Reach { services: services(family, id, host), llm, via_hatch }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Spec;
    use crate::words::{Time, Tree};

    fn models(texts: &[&str]) -> Models {
        Models::parse(texts.iter().map(|t| (*t).to_owned()).collect(), "models").unwrap()
    }

    fn service(name: &str) -> ServiceName {
        name.parse().unwrap()
    }

    fn id(n: u32) -> InstanceId {
        format!("inst-01ARZ3NDEKTSV4RRFFQ6{n:06}").parse().unwrap()
    }

    fn line(given: [Given; 3]) -> Vec<Instance> {
        let mut n = 0;
        given
            .map(|given| {
                let parent = (n > 0).then(|| id(n - 1));
                let spec = Spec { given, ..Spec::example() };
                n += 1;
                Instance::new(id(n - 1), Tree::Instance(id(0)), None, parent, spec, Time(0))
            })
            .into()
    }

    #[test]
    fn names_of_secrets_are_strict_and_a_star_stands_alone() {
        let parse = |texts: &[&str]| {
            Secrets::parse(&texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(parse(&[]).unwrap(), Secrets::default());
        assert_eq!(parse(&["*"]).unwrap(), Secrets::All);
        assert_eq!(parse(&["A", "_B9", "A"]).unwrap().texts(), ["A", "_B9"]);
        for bad in [&["a"][..], &["A", "*"], &["9A"], &["A-B"], &[""], &["A"; 33]] {
            assert_eq!(parse(bad).unwrap_err().field.as_deref(), Some("secrets"), "{bad:?}");
        }
        let named = parse(&["A", "B"]).unwrap();
        assert_eq!(named.missing(|n| n.as_str() == "A").map(SecretName::as_str), Some("B"));
        assert_eq!(Secrets::All.missing(|_| false), None);
    }

    #[test]
    fn a_star_in_a_model_stands_for_any_text() {
        for (pattern, model, expected) in [
            ("gpt-*", "gpt-5-mini", true),
            ("gpt-*", "o3", false),
            ("*", "meta/llama:70b", true),
            ("meta/*", "meta/a/b", true),
            ("claude-sonnet-4", "claude-sonnet-4-1", false),
        ] {
            assert_eq!(models(&[pattern]).admit(model), expected, "{pattern} {model}");
        }
        assert!(!models(&[]).admit("gpt-5"), "an empty list allows nothing");
    }

    #[test]
    fn nobody_has_what_one_above_has_not() {
        let give = |services: &[&str], allowed: Option<&[&str]>| Given {
            services: services.iter().map(|n| service(n)).collect(),
            models: allowed.map(models),
            ..Given::default()
        };
        let family = line([
            give(&["a", "b"], Some(&["gpt-*"])),
            give(&["a", "b", "c"], None),
            give(&["b", "c"], Some(&["gpt-5*", "o3"])),
        ]);
        let host = [service("a"), service("b"), service("c")];
        assert_eq!(services(&family, &id(0), &host), [service("a"), service("b")]);
        assert_eq!(services(&family, &id(2), &host), [service("b")]);
        assert_eq!(services(&family, &id(2), &host[..1]), [], "the host has it no more");
        assert_eq!(services(&family, &id(9), &host), [], "an unknown one has nothing");
        assert!(may_use(&family, &id(1), "gpt-4") && !may_use(&family, &id(2), "gpt-4"));
        assert!(may_use(&family, &id(2), "gpt-5-mini") && !may_use(&family, &id(2), "o3"));
        assert!(!may_use(&family, &id(9), "gpt-4") && !has_llm(&family, &id(9)));
        assert!(has_llm(&family, &id(2)));
        let hosts: Vec<HostName> = vec!["api.example.com".parse().unwrap()];
        let kept = [("KEY".parse().unwrap(), hosts.clone())];
        let seen = reach(&family, &id(2), &host, true, &kept);
        assert_eq!(seen, Reach { services: vec![service("b")], llm: true, via_hatch: vec![] });
        assert!(!reach(&family, &id(2), &host, false, &kept).llm, "nobody is behind the door");
        let mut named = family.clone();
        named[2].spec.given.secrets = Secrets::Named(vec!["KEY".parse().unwrap()]);
        assert_eq!(reach(&named, &id(2), &host, true, &kept).via_hatch, hosts);
        let none = line([give(&[], Some(&[])), give(&[], None), give(&[], None)]);
        assert!(!has_llm(&none, &id(2)) && !may_use(&none, &id(2), "gpt-4"));
    }

    #[test]
    fn a_child_asks_for_less_of_the_services_or_is_refused() {
        let parent = Given { services: vec![service("a"), service("b")], ..Given::default() };
        assert_eq!(services_of_child(&parent, None).unwrap(), parent.services);
        assert_eq!(services_of_child(&parent, Some(vec![])).unwrap(), []);
        let asked = Some(vec![service("b")]);
        assert_eq!(services_of_child(&parent, asked.clone()).unwrap(), [service("b")]);
        let refusal = services_of_child(&Given::default(), asked).unwrap_err();
        assert_eq!(refusal.rule, Some("host_services"));
    }
}
