//! A CT of a trunk with organ masks, from the source package of TotalSegmentator 2.18.0 (Apache-2.0).
//!
//! The masks are a network's predictions, not drawn by hand. `pip` fetches the package (its hash is checked by pip
//! against the index, and those of the two files here); the files are kept in the cache.

use super::DataError;
use super::fetch::{Manager, Package};
use std::fs;
use std::path::{Path, PathBuf};

const PACKAGE: Package = Package {
    manager: Manager::PipSource,
    name: "totalsegmentator",
    version: "2.18.0",
    about: "38 MB, Apache-2.0: its example CT and organ masks",
    hash: None,
    keep: |path| FILES.iter().find(|(_, member, _)| path.ends_with(member)).map(|(name, _, _)| *name),
};
/// Name in the cache, path in the package, BLAKE3.
const FILES: [(&str, &str, &str); 2] = [
    (
        "ct.nii.gz",
        "tests/reference_files/example_ct.nii.gz",
        "78c5a2a90b9a6fcadc3caa29abc445a96596467542be3178bea2bed04cef4679",
    ),
    (
        "organs.nii.gz",
        "tests/reference_files/example_seg_fast_force_split.nii.gz",
        "72a4a3d7df4652aa534b99a2a8fbdfe0a96b8f4532ecaa0ca6a35c5757accc58",
    ),
];
/// The classes that the masks' 117 are brought to.
pub const CLASSES: [&str; 5] = ["background", "liver", "spleen", "kidneys", "lungs"];

/// The class of an organ of the masks (ids of the `total` task: 1 spleen, 2 and 3 kidneys, 5 liver, 10-14 lobes of the
/// lungs).
pub fn class_of(organ: i32) -> i32 {
    match organ {
        5 => 1,
        1 => 2,
        2 | 3 => 3,
        10..=14 => 4,
        _ => 0,
    }
}

/// The image's and the masks' paths, fetched into `cache` if they are not there; `say` is told what is fetched.
///
/// # Errors
/// No `pip`, no network, or files that are not those expected.
pub fn fetch(cache: &Path, say: impl FnMut(&str)) -> Result<[PathBuf; 2], DataError> {
    let folder = cache.join(format!("{}-{}", PACKAGE.name, PACKAGE.version));
    let paths = FILES.map(|(name, _, _)| folder.join(name));
    let wrong = || FILES.iter().zip(&paths).find(|((_, _, hash), path)| !has_hash(path, hash));
    if wrong().is_none() {
        return Ok(paths);
    }
    // What is there is damaged; what cannot be removed is found to be so below.
    let _ = fs::remove_dir_all(&folder);
    PACKAGE.fetch(cache, "give a volume of your own with --data and --labels", say)?;
    match wrong() {
        None => Ok(paths),
        Some(((_, member, _), _)) => Err(DataError::Fetch(format!(
            "{member} of {} {} does not have the expected hash",
            PACKAGE.name, PACKAGE.version
        ))),
    }
}

fn has_hash(path: &Path, hash: &str) -> bool {
    fs::read(path).is_ok_and(|bytes| blake3::hash(&bytes).to_hex().as_str() == hash)
}
