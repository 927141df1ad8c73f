//! Commits: what is kept of a machine, and what one that starts from it must agree with
//! (contracts/aegis.md 7).

use std::collections::BTreeMap;

use crate::instance::{Expose, Instance, InstanceState, Origin, Protocol, Spec, Wanted};
use crate::refusal::{Code, Refusal};
use crate::words::{
    CommitId, CpuMillis, DiskBytes, Handle, ImageRef, InstanceId, MemoryMb, Port, SecretName, Time,
};

/// What is kept of a machine, besides its disk and memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Its id.
    pub id: CommitId,
    /// The host's name for it.
    pub name: Option<Handle>,
    /// Whose it was.
    pub source: InstanceId,
    /// What that was made of.
    pub image: ImageRef,
    /// Its primary process.
    pub command: Vec<String>,
    /// Its environment.
    pub env: BTreeMap<String, String>,
    /// Its working directory.
    pub cwd: Option<String>,
    /// Its CPU quota.
    pub cpu: CpuMillis,
    /// Its memory.
    pub memory: MemoryMb,
    /// Its disk.
    pub disk: DiskBytes,
    /// Its exposed ports.
    pub ports: Vec<(Port, Protocol)>,
    /// Its memory is kept too, and so its processes.
    pub with_memory: bool,
    /// It goes with the last machine that was made of it.
    pub temporary: bool,
    /// It is of a machine that the vers API lent: who uses that API may start others from it.
    pub lent: bool,
    /// When it was taken.
    pub created_at: Time,
}

/// What is asked for of a machine that starts from a commit; absent is what the commit has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Its disk alone: a machine boots from it.
    pub disk_only: bool,
    /// The image, as it was asked for.
    pub image: Option<ImageRef>,
    /// The primary process.
    pub command: Option<Vec<String>>,
    /// CPU quota.
    pub cpu: Option<CpuMillis>,
    /// Memory.
    pub memory: Option<MemoryMb>,
    /// Disk.
    pub disk: Option<DiskBytes>,
    /// Added to, and over, its environment.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// Exposed ports; those of the commit when empty.
    pub exposes: Vec<Expose>,
}

/// Whether a commit may be taken of an instance. `injected` is a secret of it whose value lies in its
/// memory, if there is one: what is kept is given to others (contracts/aegis.md 7).
pub fn may_take(
    of: &Instance,
    with_memory: bool,
    injected: Option<&SecretName>,
) -> Result<(), Refusal> {
    let runs = of.wanted == Wanted::Running && of.state == InstanceState::Running;
    if !runs {
        let message =
            format!("instance {} is {}; only what runs can be kept", of.name(), of.state.word());
        return Err(Refusal::new(Code::InstanceState, message));
    }
    if of.spec.attach && with_memory {
        let message = format!(
            "the command of {} ends with its client, which a machine that goes on from its memory has not",
            of.name()
        );
        let refusal = Refusal::new(Code::InstanceState, message).rule("attach");
        return Err(refusal.hint("commit its disk alone (disk_only)"));
    }
    match injected {
        Some(name) if with_memory => {
            let message = format!(
                "the value of the secret {name} lies in the memory of {}, and a commit is given to others",
                of.name()
            );
            let refusal = Refusal::new(Code::InstanceState, message).rule("secrets");
            Err(refusal.hint(
                "commit its disk alone (disk_only), or give the secret by proxy, so that no machine \
                 ever has its value",
            ))
        }
        _ => Ok(()),
    }
}

/// What a commit of an instance holds.
pub fn take(
    of: &Instance,
    id: CommitId,
    name: Option<Handle>,
    with_memory: bool,
    temporary: bool,
    now: Time,
) -> Commit {
    let spec = &of.spec;
    Commit {
        id,
        name,
        source: of.id.clone(),
        image: spec.image.clone(),
        command: spec.command.clone(),
        env: spec.env.clone(),
        cwd: spec.cwd.clone(),
        cpu: spec.cpu,
        memory: spec.memory,
        disk: spec.disk,
        ports: spec.exposes.iter().map(|e| (e.guest_port, e.protocol)).collect(),
        with_memory,
        temporary,
        lent: of.lent.is_some(),
        created_at: now,
    }
}

impl Commit {
    /// What a machine that starts from this is made of; nothing is in it that nobody asked for and the
    /// commit does not have.
    ///
    /// # Errors
    /// A refusal of what does not go with saved memory, or with the disk.
    pub fn spec(&self, wish: Wish) -> Result<Spec, Refusal> {
        let memory = self.with_memory && !wish.disk_only;
        let must = |field: &str, is: String| {
            let refusal = Refusal::field(field, format!("left out, or {is}, as in the commit"));
            Err(refusal.hint("disk_only boots a machine from the commit's disk alone"))
        };
        if wish.image.as_ref().is_some_and(|image| *image != self.image) {
            return must("image_ref", self.image.to_string());
        }
        if memory && wish.command.is_some() {
            return Err(Refusal::field("command", "left out: its processes go on")
                .hint("disk_only boots a machine from the commit's disk alone"));
        }
        if memory && wish.memory.is_some_and(|m| m != self.memory) {
            return must("memory_mb", self.memory.0.to_string());
        }
        let cpu = wish.cpu.unwrap_or(self.cpu);
        if memory && cpu.vcpus() != self.cpu.vcpus() {
            let vcpus = self.cpu.vcpus();
            return must(
                "vcpus",
                format!("more than {} and up to {vcpus}", vcpus.saturating_sub(1)),
            );
        }
        if wish.disk.is_some_and(|disk| disk != self.disk) {
            let refusal = Refusal::field("disk_gb", "left out: a disk keeps its size");
            return Err(refusal);
        }
        let mut env = self.env.clone();
        env.extend(wish.env);
        let exposes = if wish.exposes.is_empty() { self.exposes() } else { wish.exposes };
        Ok(Spec {
            handle: None,
            image: self.image.clone(),
            command: wish.command.unwrap_or_else(|| self.command.clone()),
            env,
            cwd: wish.cwd.or_else(|| self.cwd.clone()),
            cpu,
            memory: wish.memory.unwrap_or(self.memory),
            disk: self.disk,
            exposes,
            await_port: None,
            idle_policy: Default::default(),
            authorized_key: None,
            given: Default::default(),
            origin: Some(Origin { commit: self.id.clone(), memory }),
            attach: false,
        })
    }

    /// What a machine is made of that may have at most so much: an invite's.
    ///
    /// # Errors
    /// A refusal of `golden` that names what is short.
    pub fn within(
        &self,
        cpu: CpuMillis,
        memory: MemoryMb,
        disk: DiskBytes,
    ) -> Result<Spec, Refusal> {
        let short = |limit: &str, needs: String, has: String| {
            let needs = format!("a commit that fits: {} needs {limit} of {needs}", self.id);
            Err(Refusal::field("golden", needs.clone()).amounts(needs, has))
        };
        if memory < self.memory {
            return short("maxMemoryMB", self.memory.0.to_string(), memory.0.to_string());
        }
        if disk < self.disk {
            return short("maxDiskGB", self.disk.gb().to_string(), disk.gb().to_string());
        }
        if cpu.vcpus() < self.cpu.vcpus() {
            return short("maxCpuCores", self.cpu.cores().to_string(), cpu.cores().to_string());
        }
        let cpu = if cpu.vcpus() == self.cpu.vcpus() { cpu } else { self.cpu };
        self.spec(Wish { cpu: Some(cpu), ..Wish::default() })
    }

    /// Its ports, at no port of the host.
    fn exposes(&self) -> Vec<Expose> {
        let ports = self.ports.iter();
        ports
            .map(|(guest_port, protocol)| Expose {
                guest_port: *guest_port,
                public_port: None,
                protocol: *protocol,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::Tree;

    fn instance() -> Instance {
        let id: InstanceId = "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
        let tree = Tree::Instance(id.clone());
        let mut instance = Instance::new(id, tree, None, None, Spec::example(), Time(0));
        instance.state = InstanceState::Running;
        instance
    }

    fn commit(with_memory: bool) -> Commit {
        let id = "commit-01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
        take(&instance(), id, None, with_memory, false, Time(1))
    }

    #[test]
    fn no_value_of_a_secret_is_kept() {
        let secret: SecretName = "KEY".parse().unwrap();
        let mut of = instance();
        assert!(may_take(&of, true, None).is_ok());
        assert_eq!(may_take(&of, true, Some(&secret)).unwrap_err().rule, Some("secrets"));
        assert!(may_take(&of, false, Some(&secret)).is_ok());
        of.spec.attach = true;
        assert_eq!(may_take(&of, true, None).unwrap_err().rule, Some("attach"));
        assert!(may_take(&of, false, None).is_ok());
        of.state = InstanceState::Stopped;
        assert_eq!(may_take(&of, false, None).unwrap_err().code, Code::InstanceState);
    }

    #[test]
    fn saved_memory_keeps_its_size_and_its_processes() {
        let ask = |wish: Wish| commit(true).spec(wish).map_err(|r| r.field.unwrap());
        let spec = ask(Wish::default()).unwrap();
        assert!(spec.origin.unwrap().memory);
        let other = Some(MemoryMb(512));
        assert_eq!(ask(Wish { memory: other, ..Wish::default() }).unwrap_err(), "memory_mb");
        let cpu = Some(CpuMillis(2000));
        assert_eq!(ask(Wish { cpu, ..Wish::default() }).unwrap_err(), "vcpus");
        let half = Some(CpuMillis(500));
        assert_eq!(ask(Wish { cpu: half, ..Wish::default() }).unwrap().cpu, CpuMillis(500));
        let command = Some(vec!["sh".to_owned()]);
        let wish = Wish { command: command.clone(), ..Wish::default() };
        assert_eq!(ask(wish.clone()).unwrap_err(), "command");
        let disk = Some(DiskBytes(2));
        assert_eq!(ask(Wish { disk, ..Wish::default() }).unwrap_err(), "disk_gb");
        // Its disk alone serves machines of any size.
        for (kept, disk_only) in [(true, true), (false, false)] {
            let wish = Wish { disk_only, memory: other, cpu, ..wish.clone() };
            let spec = commit(kept).spec(wish).unwrap();
            assert!(!spec.origin.unwrap().memory);
            assert_eq!((spec.memory, spec.command), (MemoryMb(512), vec!["sh".to_owned()]));
        }
    }

    #[test]
    fn a_start_has_nothing_of_the_source_but_what_it_was_made_of() {
        let mut of = instance();
        of.spec.handle = Some("first".parse().unwrap());
        of.spec.authorized_key = Some("key".to_owned());
        of.spec.given.secrets = crate::given::Secrets::All;
        let port = Port::try_from(8080).unwrap();
        let public_port = Some(Port::try_from(20_000).unwrap());
        of.spec.exposes = vec![Expose { guest_port: port, public_port, protocol: Protocol::Http }];
        let id = "commit-01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
        let spec = take(&of, id, None, true, false, Time(1)).spec(Wish::default()).unwrap();
        assert_eq!((spec.handle, spec.authorized_key), (None, None));
        assert_eq!(spec.given, Default::default());
        assert_eq!(spec.exposes[0].public_port, None);
    }
}
