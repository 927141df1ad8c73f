//! Which image an instance has: the one of its first start, even when its name has moved on since. Its
//! own disk lies over that one, and over no other.

use std::io;

use aegis_rules::instance::Instance;

use super::worker::WorkerError;
use crate::ctx::Ctx;
use crate::images::{Image, Images};

/// Names the image, in an instance's directory.
const FILE: &str = "image";

/// What an instance has, or would get if it was started now.
pub fn image(ctx: &Ctx, instance: &Instance) -> Option<Image> {
    let images = Images::of(&ctx.config.home);
    if let Ok(digest) = std::fs::read_to_string(ctx.instance_dir(&instance.id).join(FILE)) {
        return images.fetched(digest.trim());
    }
    let origin = instance.spec.origin.as_ref().and_then(|o| ctx.commits.get(&o.commit));
    match origin.and_then(|kept| kept.digest) {
        // The disk of a commit lies over the image that its machine had.
        Some(digest) => images.fetched(&digest),
        None => images.find(&instance.spec.image),
    }
}

/// The image of an instance that starts; from now on it has no other.
pub(super) fn pinned(ctx: &Ctx, instance: &Instance) -> Result<Image, WorkerError> {
    let name = &instance.spec.image;
    let found = image(ctx, instance).ok_or_else(|| {
        WorkerError::Program(format!(
            "there is no image {name} on this host; `aegis image pull {name}` fetches it, and \
             `aegis setup` makes the image base"
        ))
    })?;
    if let Some(digest) = &found.digest {
        let write = || -> io::Result<()> {
            let dir = ctx.instance_dir(&instance.id);
            std::fs::create_dir_all(&dir)?;
            let new = dir.join("image.new");
            std::fs::write(&new, digest)?;
            std::fs::rename(new, dir.join(FILE))
        };
        write().map_err(|e| WorkerError::Program(format!("its image can't be noted: {e}")))?;
    }
    Ok(found)
}
