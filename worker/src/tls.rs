//! Mutual TLS by role: who may call is a question of roles, and hosts do not matter.
//!
//! A cluster has a certificate authority of its own (`coordinator certs init`). Every process has a certificate of it
//! with the DNS name `ROLE.mesh`, which callers verify, and the URI `mesh://role/ROLE`, from which a server reads who
//! calls ([`crate::access`]). Certificates name no hosts, so they stay good when processes move.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

/// The longest file of a certificate or key.
const FILE_BYTES: u64 = 1 << 20;
/// How long a caller may take to shake hands.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What a process is allowed to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Drives the workers.
    Coordinator,
    /// Offers devices.
    Worker,
    /// Runs model programs, and operates the cluster.
    Client,
    /// Looks, and changes nothing.
    Observer,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 4] = [Role::Coordinator, Role::Worker, Role::Client, Role::Observer];

    /// The DNS name in its certificates.
    pub fn domain(self) -> String {
        format!("{self}.mesh")
    }

    /// The URI in its certificates.
    pub fn uri(self) -> String {
        format!("mesh://role/{self}")
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Coordinator => "coordinator",
            Role::Worker => "worker",
            Role::Client => "client",
            Role::Observer => "observer",
        })
    }
}

impl FromStr for Role {
    type Err = String;
    fn from_str(s: &str) -> Result<Role, String> {
        let names = || Role::ALL.map(|r| r.to_string()).join(", ");
        Role::ALL.into_iter().find(|r| r.to_string() == s).ok_or_else(|| format!("`{s}` is none of {}", names()))
    }
}

/// The URI by which a certificate names its owner.
pub fn name_uri(name: &str) -> String {
    format!("mesh://name/{name}")
}

/// What is wrong with a process's certificate, or with an address and TLS.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that cannot be read.
    #[error(
        "W0070: cannot read {}: {why}\n  help: `coordinator certs init DIR` makes certificates; copy ca.pem, ROLE.pem \
         and ROLE.key of the process's role here", path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A file that holds something else.
    #[error("W0071: {} holds no {what}\n  help: copy it again from where `coordinator certs` made it", path.display())]
    Garbled {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// A certificate outside its time.
    #[error(
        "W0072: the certificate {} {when}\n  help: issue another one with `coordinator certs add DIR --role {role} --name \
         NAME`, or set this machine's clock", path.display()
    )]
    Expired {
        /// The file.
        path: PathBuf,
        /// Since when, or until when not.
        when: String,
        /// The role.
        role: Role,
    },
    /// A key that others can read.
    #[error(
        "W0073: the key {} can be read by others (mode {mode:04o})\n  help: chmod 600 {}; if others had access, issue \
         another one", path.display(), path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Files that do not belong together.
    #[error("W0074: {} {why}\n  help: {help}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// What to do.
        help: String,
    },
    /// An address that contradicts whether there is TLS.
    #[error("W0075: `{address}` {why}\n  help: {help}")]
    Address {
        /// The address.
        address: String,
        /// What is wrong with it.
        why: String,
        /// What to do.
        help: &'static str,
    },
}

/// A process's certificate with its key, and the authority that it trusts. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    role: Role,
    authority: Certificate,
    identity: Identity,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tls({})", self.role)
    }
}

impl Tls {
    /// Loads `ca.pem`, `ROLE.pem` and `ROLE.key` of a folder, and checks them.
    ///
    /// # Errors
    /// A file that is missing, garbled or expired, does not belong to the others, or is a key that others can read.
    pub fn load(dir: &Path, role: Role) -> Result<Tls, TlsError> {
        let [ca, certificate, key] =
            ["ca.pem".into(), format!("{role}.pem"), format!("{role}.key")].map(|f| dir.join(f));
        check(role, [&ca, &certificate, &key], [&read(&ca, false)?, &read(&certificate, false)?, &read(&key, true)?])
    }

    /// The same from texts that were just made.
    ///
    /// # Errors
    /// As for [`Tls::load`]; the names are of files that there are not.
    pub fn from_pem(role: Role, ca: &str, certificate: &str, key: &str) -> Result<Tls, TlsError> {
        let paths = ["ca.pem", "certificate", "key"].map(Path::new);
        check(role, paths, [ca.as_bytes(), certificate.as_bytes(), key.as_bytes()])
    }

    /// For a server: callers must have a certificate of the authority.
    pub fn server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new().identity(self.identity.clone()).client_ca_root(self.authority.clone()).timeout(HANDSHAKE)
    }

    /// For a caller: who is called must have that role.
    pub fn client(&self, callee: Role) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .identity(self.identity.clone())
            .ca_certificate(self.authority.clone())
            .domain_name(callee.domain())
    }
}

/// Reads a file of at most [`FILE_BYTES`]. A secret one must not be readable by others; one of another owner, such as
/// a mounted secret, may be readable by the group that gives us access.
fn read(path: &Path, secret: bool) -> Result<Vec<u8>, TlsError> {
    let unreadable = |e: std::io::Error| TlsError::Unreadable { path: path.into(), why: e.to_string() };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    #[cfg(target_os = "linux")]
    if secret {
        use std::os::unix::fs::MetadataExt;
        let about = file.metadata().map_err(unreadable)?;
        let own = about.uid() == rustix::process::geteuid().as_raw();
        if about.mode() & if own { 0o077 } else { 0o007 } != 0 {
            return Err(TlsError::Exposed { path: path.into(), mode: about.mode() & 0o7777 });
        }
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(bytes)
}

/// Checks that certificate, key and authority are what they should be.
fn check(role: Role, paths: [&Path; 3], texts: [&[u8]; 3]) -> Result<Tls, TlsError> {
    let garbled = |i: usize, what| TlsError::Garbled { path: paths[i].into(), what };
    let mismatch =
        |i: usize, why: String, help: &str| TlsError::Mismatch { path: paths[i].into(), why, help: help.into() };
    let again = "copy all three files again from where `coordinator certs` made them";
    let certificates = |i: usize| -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let all = CertificateDer::pem_slice_iter(texts[i]).collect::<Result<Vec<_>, _>>();
        all.ok().filter(|c| !c.is_empty()).ok_or_else(|| garbled(i, "certificate"))
    };
    let (authority, chain) = (certificates(0)?, certificates(1)?);
    let key = PrivateKeyDer::from_pem_slice(texts[2]).map_err(|_| garbled(2, "key"))?;
    let anchors = authority.iter().map(webpki::anchor_from_trusted_cert).collect::<Result<Vec<_>, _>>();
    let anchors = anchors.map_err(|_| garbled(0, "certificate of an authority"))?;
    let leaf = webpki::EndEntityCert::try_from(&chain[0]).map_err(|_| garbled(1, "certificate"))?;
    let verified = leaf.verify_for_usage(
        webpki::ALL_VERIFICATION_ALGS,
        &anchors,
        &chain[1..],
        UnixTime::now(),
        webpki::KeyUsage::client_auth(),
        None,
        None,
    );
    let days = |a: UnixTime, b: UnixTime| (a.as_secs().abs_diff(b.as_secs()) + 43200) / 86400;
    let expired = |when| TlsError::Expired { path: paths[1].into(), when, role };
    match verified {
        Ok(_) => {}
        Err(webpki::Error::CertExpired { time, not_after }) => {
            return Err(expired(format!("has expired {} days ago", days(time, not_after))));
        }
        Err(webpki::Error::CertNotValidYet { time, not_before }) => {
            return Err(expired(format!("becomes valid in {} days", days(time, not_before))));
        }
        Err(e) => {
            let why = format!("is not a certificate of the authority {}: {e}", paths[0].display());
            return Err(mismatch(1, why, again));
        }
    }
    let own = owner(&chain[0]);
    if own.as_ref().and_then(|o| o.role) != Some(role) {
        let is = own.and_then(|o| o.role).map_or("no role".into(), |r| format!("the role {r}"));
        let help = format!("issue one with `coordinator certs add DIR --role {role} --name NAME`");
        return Err(mismatch(1, format!("has {is}, and is needed for the role {role}"), &help));
    }
    CertifiedKey::from_der(chain, key, &rustls::crypto::ring::default_provider())
        .map_err(|_| mismatch(2, format!("is not the key of the certificate {}", paths[1].display()), again))?;
    Ok(Tls { role, authority: Certificate::from_pem(texts[0]), identity: Identity::from_pem(texts[1], texts[2]) })
}

/// What a certificate says about its owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The role, if it has exactly one.
    pub role: Option<Role>,
    /// The name.
    pub name: Option<String>,
}

/// Reads a certificate's URIs; None if it is no certificate. Whether it is to be trusted must have been verified.
pub fn owner(certificate: &CertificateDer<'_>) -> Option<Owner> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    let mut roles = certificate.valid_uri_names().filter_map(|u| u.strip_prefix("mesh://role/"));
    let role = roles.next().and_then(|r| r.parse().ok()).filter(|_| roles.next().is_none());
    let name = certificate.valid_uri_names().find_map(|u| u.strip_prefix("mesh://name/").map(String::from));
    Some(Owner { role, name })
}

/// An address with its scheme: `host:port` is completed, a scheme must agree with whether there is TLS.
///
/// # Errors
/// A scheme that contradicts.
pub fn url(address: &str, tls: bool) -> Result<String, TlsError> {
    let wrong = |why: &str, help| TlsError::Address { address: address.into(), why: why.into(), help };
    match (address.split_once("://").map(|(scheme, _)| scheme), tls) {
        (None, true) => Ok(format!("https://{address}")),
        (None, false) => Ok(format!("http://{address}")),
        (Some("https"), true) | (Some("http"), false) => Ok(address.into()),
        (Some("http"), true) => {
            Err(wrong("means no encryption, but --tls is given", "write `https://` or `host:port`"))
        }
        (Some("https"), false) => {
            Err(wrong("means TLS, but there are no certificates", "name their folder with --tls"))
        }
        (Some(_), _) => Err(wrong("is of an unknown scheme", "write `host:port`")),
    }
}

/// Why TLS refuses a connection, if that is what an error comes from: another attempt would not help.
pub fn refusal(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(e) = next {
        let inner = e.downcast_ref::<std::io::Error>().and_then(|e| e.get_ref());
        let tls = inner.and_then(|i| i.downcast_ref::<rustls::Error>()).or_else(|| e.downcast_ref());
        match tls {
            Some(rustls::Error::InvalidMessage(_)) => {
                return Some("it does not speak TLS; start it with --tls, or leave --tls out here".into());
            }
            Some(rustls::Error::InvalidCertificate(why)) => {
                return Some(format!(
                    "its certificate is not good: {why}; all processes need certificates of one authority"
                ));
            }
            Some(rustls::Error::AlertReceived(why)) => {
                return Some(format!("it does not accept this process's certificate: {why:?}"));
            }
            _ => next = e.source(),
        }
    }
    None
}

/// An error with what caused it.
pub fn causes(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(e) = next {
        text += &format!(": {e}");
        next = e.source();
    }
    text
}

/// What a call that failed says: what caused it, or else what the other side answered.
pub fn said(status: &tonic::Status) -> String {
    std::error::Error::source(status).map_or_else(|| status.message().into(), causes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_written_as_they_are_read() {
        for role in Role::ALL {
            assert_eq!(role.to_string().parse(), Ok(role));
        }
        assert!("admin".parse::<Role>().unwrap_err().contains("coordinator, worker, client, observer"));
    }

    #[test]
    fn a_scheme_that_contradicts_is_refused_and_a_missing_one_is_completed() {
        assert_eq!(url("h:1", true).unwrap(), "https://h:1");
        assert_eq!(url("h:1", false).unwrap(), "http://h:1");
        assert_eq!(url("https://h:1", true).unwrap(), "https://h:1");
        for (address, tls, text) in [
            ("http://h:1", true, "help: write `https://`"),
            ("https://h:1", false, "help: name their folder with --tls"),
            ("ftp://h:1", true, "unknown scheme"),
        ] {
            let e = url(address, tls).unwrap_err().to_string();
            assert!(e.starts_with("W0075: ") && e.contains(text), "{e}");
        }
    }
}
