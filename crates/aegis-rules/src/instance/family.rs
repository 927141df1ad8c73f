//! Who descends from whom, among all records of one tree as of one transaction.

use super::Instance;
use crate::words::InstanceId;

/// The record with this id.
pub fn find<'a>(family: &'a [Instance], id: &InstanceId) -> Option<&'a Instance> {
    family.iter().find(|i| i.id == *id)
}

/// Whom it spawned.
pub fn children<'a>(
    family: &'a [Instance],
    id: &'a InstanceId,
) -> impl Iterator<Item = &'a Instance> {
    family.iter().filter(move |i| i.parent.as_ref() == Some(id))
}

/// Itself, its parent, and so on up to the root.
pub fn ancestors<'a>(
    family: &'a [Instance],
    id: &InstanceId,
) -> impl Iterator<Item = &'a Instance> {
    let first = find(family, id);
    // Ids only ever lead to older records, but a damaged one must not make this endless.
    std::iter::successors(first, |i| i.parent.as_ref().and_then(|p| find(family, p)))
        .take(family.len())
}

/// Itself and all of its descendants, each after its parent.
pub fn subtree<'a>(family: &'a [Instance], id: &InstanceId) -> Vec<&'a Instance> {
    let mut found: Vec<&Instance> = find(family, id).into_iter().collect();
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(children(family, &parent.id));
        next += 1;
        if found.len() > family.len() {
            // Only in a damaged tree.
            found.truncate(family.len());
            break;
        }
    }
    found
}
