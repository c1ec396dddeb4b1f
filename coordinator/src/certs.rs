//! Certificates of a cluster: an authority of its own, and a certificate a process that says its role and not its host.

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use worker::tls::{Role, Tls, TlsError, name_uri};

const DAY: Duration = Duration::from_secs(86400);
/// Days for which an authority is meant; callers check the certificates' own days.
const AUTHORITY_DAYS: u32 = 3650;
/// Clocks may differ by so much.
const SKEW: Duration = Duration::from_secs(3600);
/// The name of every authority: what tells them apart is the key.
const AUTHORITY: &str = "mesh certificate authority";

/// Why certificates could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// There is an authority already.
    #[error(
        "C0030: {} is there already, and every certificate of it would become worthless\n  help: issue a certificate of \
         it with `coordinator certs add`, or name another folder", path.display()
    )]
    Exists {
        /// What is there.
        path: PathBuf,
    },
    /// A file that cannot be read or written.
    #[error("C0031: {}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: std::io::Error,
    },
    /// An authority that cannot sign.
    #[error("C0032: {} is not the key of an authority: {why}\n  help: make one with `coordinator certs init DIR`", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A name that is none.
    #[error("C0033: `{name}` is no name for a certificate\n  help: use letters, digits, `-`, `_` and `.`, at most 64")]
    Name {
        /// The name.
        name: String,
    },
    /// What cannot be made.
    #[error("C0034: a certificate could not be made: {0}")]
    Make(String),
    /// What was made, or the authority, is not good.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

fn made<T>(result: Result<T, rcgen::Error>) -> Result<T, CertsError> {
    result.map_err(|e| CertsError::Make(e.to_string()))
}

fn written<T>(path: &Path, result: std::io::Result<T>) -> Result<T, CertsError> {
    result.map_err(|why| CertsError::File { path: path.into(), why })
}

/// A certificate and its key as PEM texts.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

/// A cluster's certificate authority.
pub struct Authority {
    pem: String,
    key: String,
    issuer: Issuer<'static, KeyPair>,
}

/// What an authority's own certificate says.
fn own_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, AUTHORITY);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl Authority {
    /// Makes one, in memory.
    ///
    /// # Errors
    /// A machine without random numbers.
    pub fn new() -> Result<Authority, CertsError> {
        let key = made(KeyPair::generate())?;
        let mut params = own_params();
        let now = SystemTime::now();
        (params.not_before, params.not_after) = ((now - SKEW).into(), (now + DAY * AUTHORITY_DAYS).into());
        let pem = made(params.self_signed(&key))?.pem();
        Ok(Authority { pem, key: key.serialize_pem(), issuer: Issuer::new(params, key) })
    }

    /// Loads `ca.pem` and `ca.key` of a folder.
    ///
    /// # Errors
    /// Files that are missing or are something else.
    pub fn load(dir: &Path) -> Result<Authority, CertsError> {
        let [pem_path, key_path] = ["ca.pem", "ca.key"].map(|f| dir.join(f));
        let pem = written(&pem_path, fs::read_to_string(&pem_path))?;
        let key = written(&key_path, fs::read_to_string(&key_path))?;
        let pair = KeyPair::from_pem(&key)
            .map_err(|e| CertsError::Authority { path: key_path.clone(), why: e.to_string() })?;
        let authority = Authority { pem, key, issuer: Issuer::new(own_params(), pair) };
        // What it signs must be good by the certificate beside it.
        let now = SystemTime::now();
        let probe = authority.issue(Role::Client, "probe", now - SKEW, now + DAY)?;
        authority.tls(Role::Client, &probe).map_err(|_| CertsError::Authority {
            path: key_path,
            why: format!("what it signs is not good by {}", pem_path.display()),
        })?;
        Ok(authority)
    }

    /// The authority's certificate.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Issues a certificate for a role, good between two points in time.
    ///
    /// # Errors
    /// A name that is none.
    pub fn issue(&self, role: Role, name: &str, from: SystemTime, until: SystemTime) -> Result<Issued, CertsError> {
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(good) {
            return Err(CertsError::Name { name: name.into() });
        }
        let text = |s: String| Ia5String::try_from(s).map_err(|e| CertsError::Make(e.to_string()));
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = vec![
            SanType::DnsName(text(role.domain())?),
            SanType::URI(text(role.uri())?),
            SanType::URI(text(name_uri(name))?),
        ];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if matches!(role, Role::Coordinator | Role::Worker) {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (from.into(), until.into());
        let key = made(KeyPair::generate())?;
        let certificate = made(params.signed_by(&key, &self.issuer))?.pem();
        Ok(Issued { certificate, key: key.serialize_pem() })
    }

    /// Issues one that is good from now on.
    ///
    /// # Errors
    /// As for [`Authority::issue`].
    pub fn issue_for(&self, role: Role, name: &str, days: u32) -> Result<Issued, CertsError> {
        let now = SystemTime::now();
        self.issue(role, name, now - SKEW, now + DAY * days)
    }

    /// The TLS of a process with that certificate.
    ///
    /// # Errors
    /// A certificate that is not good by this authority.
    pub fn tls(&self, role: Role, issued: &Issued) -> Result<Tls, TlsError> {
        Tls::from_pem(role, &self.pem, &issued.certificate, &issued.key)
    }

    /// Writes what a process of that role is given: `ca.pem`, `ROLE.pem` and `ROLE.key`.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn write(&self, dir: &Path, role: Role, issued: &Issued) -> Result<(), CertsError> {
        folder(dir)?;
        write(&dir.join("ca.pem"), &self.pem, false)?;
        write(&dir.join(format!("{role}.pem")), &issued.certificate, false)?;
        write(&dir.join(format!("{role}.key")), &issued.key, true)
    }
}

/// Makes a folder that is its owner's alone, if there is none.
fn folder(dir: &Path) -> Result<(), CertsError> {
    if dir.is_dir() {
        return Ok(());
    }
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    written(dir, builder.recursive(true).create(dir))
}

/// Writes a file; one that is secret is never readable by others, not even for a moment.
fn write(path: &Path, text: &str, secret: bool) -> Result<(), CertsError> {
    let fresh = path.with_extension("new");
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, if secret { 0o600 } else { 0o644 });
    let _ = fs::remove_file(&fresh);
    let mut file = written(&fresh, options.open(&fresh))?;
    written(&fresh, file.write_all(text.as_bytes()))?;
    written(path, fs::rename(&fresh, path))
}

/// Makes an authority and a certificate for each role in a folder; says what it wrote.
///
/// # Errors
/// A folder that holds an authority already, or cannot be written.
pub fn init(dir: &Path, days: u32) -> Result<String, CertsError> {
    let paths = ["ca.pem", "ca.key"].map(|f| dir.join(f));
    if let Some(path) = paths.iter().find(|p| p.exists()) {
        return Err(CertsError::Exists { path: path.clone() });
    }
    let authority = Authority::new()?;
    folder(dir)?;
    write(&paths[1], &authority.key, true)?;
    for role in Role::ALL {
        authority.write(dir, role, &authority.issue_for(role, &role.to_string(), days)?)?;
    }
    let mut said = format!("wrote to {}, good for {days} days:\n", dir.display());
    for (role, whom) in [
        (Role::Coordinator, "the coordinator's machine"),
        (Role::Worker, "each machine of a worker"),
        (Role::Client, "who runs model programs or operates the cluster"),
        (Role::Observer, "who may only look"),
    ] {
        said += &format!("  ca.pem, {:31} for {whom}\n", format!("{role}.pem, {role}.key"));
    }
    said += "  ca.key                                  stays here: who has it can make any certificate\n\
             Name a folder with the three files of a role by --tls; give nobody files of another role.\n";
    Ok(said)
}

/// Issues a further certificate of a folder's authority, in a folder of its own; says what it wrote.
///
/// # Errors
/// A folder without an authority, or a name that is none or taken.
pub fn add(dir: &Path, role: Role, name: &str, days: u32) -> Result<String, CertsError> {
    let authority = Authority::load(dir)?;
    let issued = authority.issue_for(role, name, days)?;
    let out = dir.join(name);
    if out.exists() {
        return Err(CertsError::Exists { path: out });
    }
    authority.write(&out, role, &issued)?;
    Ok(format!(
        "wrote ca.pem, {role}.pem and {role}.key to {}, good for {days} days: copy that folder to the machine, and name it \
         there by --tls\n",
        out.display()
    ))
}
