//! Whether a pattern allows an image. An image has several names that mean the same; a pattern
//! allows all of them or none (contracts/aegis.md 3).

use super::glob::Glob;

/// Whether the pattern allows the image of this name.
pub(super) fn allows(pattern: &str, reference: &str) -> bool {
    let pattern = glob(pattern);
    names(reference).iter().any(|name| pattern.covers(&Glob::literal(name)))
}

/// Whether everything that `narrow` allows is allowed by `wide`.
pub(super) fn covers(wide: &str, narrow: &str) -> bool {
    // A pattern without stars is one of the names of one image.
    glob(wide).covers(&glob(narrow)) || (!narrow.contains('*') && allows(wide, narrow))
}

fn glob(pattern: &str) -> Glob {
    // `*` alone means any image, slashes or not.
    if pattern == "*" { Glob::any() } else { Glob::new(pattern) }
}

/// All names of the image: with and without the default registry, its library and the default tag.
/// A tag beside a digest says nothing, and is not a name.
fn names(reference: &str) -> Vec<String> {
    let (name, digest) = match reference.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (reference, None),
    };
    // A colon before the last slash belongs to a port.
    let (name, tag) = match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (name, "latest"),
    };
    let (registry, path) = match name.split_once('/') {
        Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => (first, path),
        _ => ("docker.io", name),
    };
    let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
    let mut stems = Vec::new();
    if registry == "docker.io" {
        let path = path.strip_prefix("library/").unwrap_or(path);
        stems.extend([path.to_owned(), format!("docker.io/{path}")]);
        if !path.contains('/') {
            stems.extend([format!("library/{path}"), format!("docker.io/library/{path}")]);
        }
    } else {
        stems.push(format!("{registry}/{path}"));
    }
    let mut out = Vec::new();
    for stem in stems {
        match digest {
            Some(digest) => out.push(format!("{stem}@{digest}")),
            None => {
                out.push(format!("{stem}:{tag}"));
                if tag == "latest" {
                    out.push(stem);
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_image_is_allowed_by_all_of_its_names_or_by_none() {
        for (pattern, reference, expected) in [
            ("*", "ghcr.io/acme/bot:1", true),
            ("node:22", "node:22", true),
            ("node:22", "docker.io/library/node:22", true),
            ("docker.io/library/node:22", "node:22", true),
            ("docker.io/library/*", "node:22", true),
            ("node:*", "docker.io/node:22", true),
            ("node:22", "node:23", false),
            ("node:22", "node:22-evil", false),
            ("node:22", "evil/node:22", false),
            ("node:22", "ghcr.io/library/node:22", false),
            ("node:22", "localhost/node:22", false),
            ("alpine", "alpine:latest", true),
            ("alpine", "alpine:3.20", false),
            ("node:22", "node:22@sha256:00", false),
            ("node:22*", "node:22@sha256:00", false),
            ("node@sha256:00", "node:22@sha256:00", true),
            ("ghcr.io/acme/**", "ghcr.io/acme/a/b:1", true),
            ("ghcr.io/acme/**", "ghcr.io/acme2/a", false),
            ("host:5000/x:1", "host:5000/x:1", true),
            ("host:5000/x", "host:5000/x:latest", true),
            ("", "node", false),
        ] {
            assert_eq!(allows(pattern, reference), expected, "{pattern} {reference}");
        }
    }

    fn reference() -> impl Strategy<Value = String> {
        "(docker\\.io/|index\\.docker\\.io/|ghcr\\.io/|localhost/|)(library/|a/|)(n|a)(:1|:latest|)(@d:0|)"
    }

    fn pattern() -> impl Strategy<Value = String> {
        prop_oneof![reference(), "[a*:/]{1,4}", "(docker\\.io/|a/|)(\\*|n)(:\\*|:1|)"]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn covering_is_never_wrong(wide in pattern(), narrow in pattern(), image in reference()) {
            if covers(&wide, &narrow) && allows(&narrow, &image) {
                prop_assert!(allows(&wide, &image), "{wide} {narrow} {image}");
            }
        }
    }
}
