//! That nothing gets wider on the way down.

use proptest::prelude::*;

use super::*;

fn list(item: &'static str) -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(item, 0..4)
}

const IMAGES: &str = "(docker\\.io/|g\\.io/|)(library/|a/|\\*\\*/|)(n|a|\\*)(:1|:\\*|:latest|)";
const SECRETS: &str = "A|B|C|\\*";
const PATHS: &str = "(/(a|b|ab|\\*|\\*\\*)){1,3}";

fn capabilities() -> impl Strategy<Value = Capabilities> {
    (
        any::<bool>(),
        0u32..4,
        0u32..4,
        list(IMAGES),
        0u32..3,
        0u32..3,
        list(SECRETS),
        list(PATHS),
        0u32..3,
    )
        .prop_map(|(spawn, depth, children, images, memory, vcpus, secrets, paths, ports)| {
            Capabilities {
                spawn,
                spawn_depth: depth,
                max_children: children,
                allowed_images: images,
                max_memory: MemoryMb(memory * 128),
                max_vcpus: vcpus,
                allowed_secrets: secrets,
                allowed_workspaces: paths,
                max_expose_ports: ports,
            }
        })
}

fn ask() -> impl Strategy<Value = CapabilityAsk> {
    (capabilities(), any::<u16>()).prop_map(|(c, which)| {
        fn maybe<T>(which: u16, bit: u16, value: T) -> Option<T> {
            (which & (1 << bit) != 0).then_some(value)
        }
        CapabilityAsk {
            spawn: maybe(which, 0, c.spawn),
            spawn_depth: maybe(which, 1, c.spawn_depth),
            max_children: maybe(which, 2, c.max_children),
            allowed_images: maybe(which, 3, c.allowed_images),
            max_memory: maybe(which, 4, c.max_memory),
            max_vcpus: maybe(which, 5, c.max_vcpus),
            allowed_secrets: maybe(which, 6, c.allowed_secrets),
            allowed_workspaces: maybe(which, 7, c.allowed_workspaces),
            max_expose_ports: maybe(which, 8, c.max_expose_ports),
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn no_ask_widens_any_field(
        parent in capabilities(),
        ask in ask(),
        image in "(docker\\.io/|g\\.io/|)(library/|a/|)(n|a)(:1|:latest|)",
        secret in SECRETS,
        path in "(/(a|b|ab)){1,4}",
    ) {
        let child = narrow(&parent, &ask).unwrap();
        prop_assert!(!child.spawn || parent.spawn && parent.spawn_depth > 1);
        prop_assert!(child.spawn_depth < parent.spawn_depth || child.spawn_depth == 0);
        prop_assert!(child.max_children <= parent.max_children);
        prop_assert!(child.max_memory <= parent.max_memory);
        prop_assert!(child.max_vcpus <= parent.max_vcpus);
        prop_assert!(child.max_expose_ports <= parent.max_expose_ports);
        let image: ImageRef = image.parse().unwrap();
        prop_assert!(!child.allows_image(&image) || parent.allows_image(&image), "{image}");
        let secrets = [secret];
        prop_assert!(
            child.forbidden_secret(&secrets).is_some()
                || parent.forbidden_secret(&secrets).is_none()
        );
        let path = WorkspaceAsk { given: path.clone(), resolved: Some(path) };
        prop_assert!(child.workspace(&path).is_none() || parent.workspace(&path).is_some());
    }

    /// And what was asked for and is allowed is not lost.
    #[test]
    fn plain_names_survive(ask in ask()) {
        let parent = Capabilities {
            spawn: true, spawn_depth: 9, max_children: 9, allowed_images: vec!["*".to_owned()],
            max_memory: MemoryMb(9999), max_vcpus: 9, allowed_secrets: vec!["*".to_owned()],
            allowed_workspaces: vec!["/".to_owned()], max_expose_ports: 9,
        };
        let child = narrow(&parent, &ask).unwrap();
        for image in ask.allowed_images.iter().flatten() {
            prop_assert!(child.allowed_images.contains(image));
        }
        for path in ask.allowed_workspaces.iter().flatten() {
            prop_assert!(child.allowed_workspaces.contains(path));
        }
    }
}

proptest! {
    /// What both allow lies within either; what lies within allows no more.
    #[test]
    fn a_ceiling_holds(a in capabilities(), b in capabilities()) {
        prop_assert!(a.within(&a).is_ok());
        let both = a.meet(&b);
        prop_assert!(both.within(&a).is_ok() && both.within(&b).is_ok());
        if a.within(&b).is_ok() {
            prop_assert!(a.max_memory <= b.max_memory && a.spawn <= b.spawn);
            for pattern in &a.allowed_images {
                prop_assert!(b.allowed_images.iter().any(|wide| image::covers(wide, pattern)));
            }
        }
    }
}

#[test]
fn what_goes_beyond_a_ceiling_is_named() {
    let ceiling = Capabilities {
        spawn: true,
        spawn_depth: 1,
        allowed_images: vec!["*".to_owned(), "node:22".to_owned()],
        ..Capabilities::default()
    };
    let fits = Capabilities { allowed_images: vec!["node:*".to_owned()], ..ceiling.clone() };
    fits.within(&ceiling).unwrap();
    let deep = Capabilities { spawn_depth: 2, ..fits.clone() };
    let refusal = deep.within(&ceiling).unwrap_err();
    assert_eq!(refusal.rule, Some("spawn_depth"));
    assert_eq!((refusal.requested.as_deref(), refusal.allowed.as_deref()), (Some("2"), Some("1")));
    let secret = Capabilities { allowed_secrets: vec!["KEY".to_owned()], ..fits };
    assert_eq!(secret.within(&ceiling).unwrap_err().rule, Some("allowed_secrets"));
}

#[test]
fn nothing_given_is_nothing_allowed() {
    let none = CapabilityAsk::default().granted().unwrap();
    assert_eq!(none, Capabilities::default());
    assert!(!none.allows_image(&"base".parse().unwrap()));
    assert!(!none.allows_cpu(CpuMillis(1)));
    assert_eq!(none.forbidden_secret(&["A".to_owned()]), Some("A"));
    assert_eq!(none.forbidden_secret(&[]), None);
    let path = WorkspaceAsk { given: "/a".to_owned(), resolved: Some("/a".to_owned()) };
    assert_eq!(none.workspace(&path), None);
    assert_eq!(narrow(&none, &CapabilityAsk::default()).unwrap(), none);
}

#[test]
fn all_secrets_are_only_for_whom_all_are_allowed() {
    let some = Capabilities { allowed_secrets: vec!["A".to_owned()], ..Capabilities::default() };
    assert_eq!(some.forbidden_secret(&["A".to_owned(), "*".to_owned()]), Some("*"));
}

#[test]
fn malformed_lists_are_refused_by_name() {
    let images = |list: &[&str]| CapabilityAsk {
        allowed_images: Some(list.iter().map(|s| (*s).to_owned()).collect()),
        ..CapabilityAsk::default()
    };
    for good in ["*", "**", "node:*", "*/x", "ghcr.io/acme/**", "base"] {
        assert!(images(&[good]).granted().is_ok(), "{good}");
    }
    for bad in ["", "a b", "../x", "-x", &"x".repeat(300)] {
        let refusal = images(&[bad]).granted().unwrap_err();
        assert_eq!(refusal.field.as_deref(), Some("capabilities.allowed_images"), "{bad}");
    }
    assert!(images(&["a"; LIST_MAX + 1]).granted().is_err());
    assert!(images(&["x".repeat(200).as_str(); 11]).granted().is_err(), "too long together");
    let paths = |path: &str| CapabilityAsk {
        allowed_workspaces: Some(vec![path.to_owned()]),
        ..CapabilityAsk::default()
    };
    assert!(paths("/a/*").granted().is_ok());
    for bad in ["", "a", "/a/../b"] {
        assert!(paths(bad).granted().is_err(), "{bad}");
    }
}
