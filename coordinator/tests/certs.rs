//! Certificates: what `certs` makes, and what a process refuses to start with.

use coordinator::certs::{self, Authority};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};
use worker::tls::{Role, Tls};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn error<T>(result: Result<T, impl std::fmt::Display>) -> String {
    match result {
        Ok(_) => panic!("it is accepted"),
        Err(e) => e.to_string(),
    }
}

fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_coordinator")).args(args).output().unwrap();
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (done.status.code(), text(&done.stdout), text(&done.stderr))
}

#[test]
fn init_makes_a_certificate_for_each_role_and_keys_are_their_owners_alone() {
    let dir = tempfile::tempdir().unwrap();
    let made = dir.path().join("certs");
    let (code, out, err) = run(&["certs", "init", made.to_str().unwrap(), "--days", "30"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("good for 30 days") && out.contains("worker.pem, worker.key"), "{out}");
    assert_eq!(mode(&made), 0o700);
    assert_eq!(mode(&made.join("ca.key")), 0o600);
    for role in Role::ALL {
        assert_eq!(mode(&made.join(format!("{role}.key"))), 0o600);
        Tls::load(&made, role).unwrap();
    }
    let before = fs::read(made.join("ca.pem")).unwrap();
    let (code, _, err) = run(&["certs", "init", made.to_str().unwrap()]);
    assert_eq!(code, Some(2));
    assert!(err.starts_with("error[C0030]: ") && err.contains("ca.pem is there already"), "{err}");
    assert_eq!(fs::read(made.join("ca.pem")).unwrap(), before);
}

#[test]
fn a_further_certificate_comes_in_a_folder_that_can_be_named_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    certs::init(dir.path(), 30).unwrap();
    let at = dir.path().to_str().unwrap();
    let (code, out, err) = run(&["certs", "add", at, "--role", "worker", "--name", "node-7"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("node-7"), "{out}");
    let folder = dir.path().join("node-7");
    Tls::load(&folder, Role::Worker).unwrap();
    assert!(error(Tls::load(&folder, Role::Client)).starts_with("W0070: cannot read "));
    for (role, name, text) in [
        ("worker", "node-7", "error[C0030]: "),
        ("worker", "../up", "error[C0033]: `../up` is no name"),
        ("worker", ".hidden", "error[C0033]: "),
        ("boss", "b", "`boss` is none of coordinator, worker, client, observer"),
    ] {
        let (code, _, err) = run(&["certs", "add", at, "--role", role, "--name", name]);
        assert!(code == Some(2) && err.contains(text), "{err}");
    }
    // Another authority's key does not sign for this one.
    let other = tempfile::tempdir().unwrap();
    certs::init(other.path(), 30).unwrap();
    fs::copy(other.path().join("ca.key"), dir.path().join("ca.key")).unwrap();
    let (code, _, err) = run(&["certs", "add", at, "--role", "worker", "--name", "node-8"]);
    assert!(code == Some(2) && err.starts_with("error[C0032]: "), "{err}");
    assert!(!dir.path().join("node-8").exists());
}

#[test]
fn files_that_are_not_good_are_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new().unwrap();
    let (now, day) = (SystemTime::now(), Duration::from_secs(86400));
    let issue = |role, from, until| authority.issue(role, "w", from, until).unwrap();
    let good = issue(Role::Worker, now - day, now + day);
    let certificate = dir.path().join("worker.pem");
    let key = dir.path().join("worker.key");
    let load = |issued: &certs::Issued, spoil: &dyn Fn()| {
        authority.write(dir.path(), Role::Worker, issued).unwrap();
        spoil();
        error(Tls::load(dir.path(), Role::Worker))
    };
    let none = || {};

    let e = load(&issue(Role::Worker, now - 9 * day, now - 3 * day), &none);
    assert!(e.starts_with("W0072: the certificate ") && e.contains("worker.pem has expired 3 days ago"), "{e}");
    assert!(e.contains("certs add DIR --role worker"), "{e}");
    let e = load(&issue(Role::Worker, now + 3 * day, now + 9 * day), &none);
    assert!(e.starts_with("W0072: ") && e.contains("becomes valid in 3 days"), "{e}");
    let e = load(&issue(Role::Client, now - day, now + day), &none);
    assert!(e.starts_with("W0074: ") && e.contains("has the role client, and is needed for the role worker"), "{e}");

    let e = load(&good, &|| fs::remove_file(&key).unwrap());
    assert!(e.starts_with("W0070: cannot read ") && e.contains("worker.key: No such file"), "{e}");
    assert!(e.contains("help: `coordinator certs init DIR`"), "{e}");
    let e = load(&good, &|| fs::write(&certificate, "-----BEGIN").unwrap());
    assert!(e.starts_with("W0071: ") && e.contains("worker.pem holds no certificate"), "{e}");
    let e = load(&good, &|| fs::write(&key, &good.certificate).unwrap());
    assert!(e.starts_with("W0071: ") && e.contains("worker.key holds no key"), "{e}");
    let e = load(&good, &|| fs::write(&key, issue(Role::Worker, now, now + day).key).unwrap());
    assert!(e.starts_with("W0074: ") && e.contains("worker.key is not the key of the certificate"), "{e}");
    let other = Authority::new().unwrap();
    let e = load(&good, &|| fs::write(dir.path().join("ca.pem"), other.pem()).unwrap());
    assert!(e.starts_with("W0074: ") && e.contains("worker.pem is not a certificate of the authority"), "{e}");

    for open in [0o640, 0o604, 0o660] {
        let e = load(&good, &|| fs::set_permissions(&key, fs::Permissions::from_mode(open)).unwrap());
        assert!(e.starts_with("W0073: ") && e.contains(&format!("mode {open:04o}")) && e.contains("chmod 600"), "{e}");
    }
    authority.write(dir.path(), Role::Worker, &good).unwrap();
    Tls::load(dir.path(), Role::Worker).unwrap();
}

#[test]
fn a_coordinator_that_is_not_secure_is_refused_with_the_way_out() {
    let (code, _, err) = run(&["--listen", "0.0.0.0:0"]);
    assert_eq!(code, Some(2), "{err}");
    assert!(err.starts_with("error[W0033]: 0.0.0.0:0 can be reached from other hosts"), "{err}");
    assert!(err.contains("--tls (`coordinator certs init` makes one)") && err.contains("--insecure"), "{err}");
    let dir = tempfile::tempdir().unwrap();
    let (code, _, err) = run(&["--listen", "0.0.0.0:0", "--tls", dir.path().to_str().unwrap()]);
    assert_eq!(code, Some(2), "{err}");
    assert!(err.starts_with("error[W0070]: cannot read ") && err.contains("ca.pem"), "{err}");
    let file = dir.path().join("c.toml");
    fs::write(&file, "wait = 3\n\nreplace_timeout = 4\n").unwrap();
    let (code, _, err) = run(&["--config", file.to_str().unwrap()]);
    assert_eq!(code, Some(2), "{err}");
    assert!(
        err.starts_with("error[W0061]: ") && err.contains("c.toml:3\n  help: did you mean `replace-timeout`?"),
        "{err}"
    );
    let (code, out, _) = run(&["--help"]);
    assert_eq!(code, Some(0));
    for text in [
        "Examples:",
        "Exit codes:",
        "certs",
        "--replace-timeout",
        "MESH_TLS",
        "MESH_STATE",
        "MESH_STORE",
        "MESH_STATUS",
    ] {
        assert!(out.contains(text), "no {text} in\n{out}");
    }
}
