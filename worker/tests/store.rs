//! Stores of checkpoints: the same rules hold for a folder, for memory, and for a real S3 server.

use bytes::Bytes;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::Command;
use worker::store::{Store, StoreError};

/// What every store keeps to, by name.
macro_rules! rules {
    ($($rule:ident),* $(,)?) => { &[$((stringify!($rule), $rule as fn(&Store))),*] };
}
const RULES: &[(&str, fn(&Store))] = rules![
    what_is_put_is_got_whole_and_in_ranges,
    what_is_put_again_takes_the_place_of_the_old,
    ranges_that_a_file_does_not_have_are_refused,
    a_file_beyond_the_limit_is_refused_with_its_size,
    what_is_not_there_is_not_found,
    a_put_that_stops_half_way_leaves_nothing,
    names_are_listed_folder_by_folder,
    deleting_takes_a_folder_and_nothing_beside_it,
    names_that_lead_out_are_refused,
    names_may_have_what_is_special_elsewhere,
    what_is_larger_than_a_request_is_put_and_got_in_pieces,
];

fn hold(location: &str) {
    for (name, rule) in RULES {
        println!("{location}: {name}");
        rule(&Store::open(&format!("{location}/{name}")).unwrap());
    }
}

/// Bytes that differ from place to place.
fn noise(bytes: usize) -> Bytes {
    (0..bytes).map(|i| (i.wrapping_mul(2654435761) >> 13) as u8).collect()
}

fn put(store: &Store, path: &str, bytes: &Bytes) -> Result<u64, StoreError> {
    // In three parts, one of them empty.
    let half = bytes.len() / 2;
    store.put(path, &mut [bytes.slice(..half), Bytes::new(), bytes.slice(half..)].into_iter())
}

fn what_is_put_is_got_whole_and_in_ranges(store: &Store) {
    for size in [0, 1, 1000, (1 << 20) + 1] {
        let (name, bytes) = (format!("step-7/of {size}.safetensors"), noise(size));
        assert_eq!(put(store, &name, &bytes), Ok(size as u64));
        assert_eq!(store.size(&name), Ok(Some(size as u64)));
        assert_eq!(store.get(&name, size as u64), Ok(bytes.clone()));
        for (start, end) in [(0, size), (size / 3, size / 2), (size.saturating_sub(1), size), (size, size)] {
            let range = store.get_range(&name, start as u64..end as u64);
            assert_eq!(range, Ok(bytes.slice(start..end)), "{start}..{end} of {size}");
        }
    }
}

fn what_is_put_again_takes_the_place_of_the_old(store: &Store) {
    put(store, "manifest.json", &noise(2000)).unwrap();
    put(store, "manifest.json", &noise(10)).unwrap();
    assert_eq!(store.get("manifest.json", 4000), Ok(noise(10)));
    assert_eq!(store.list(""), Ok(vec!["manifest.json".into()]));
}

fn ranges_that_a_file_does_not_have_are_refused(store: &Store) {
    put(store, "a", &noise(100)).unwrap();
    #[expect(clippy::reversed_empty_ranges, reason = "that is the point")]
    for range in [0..101, 100..101, 500..600, 101..101, u64::MAX - 1..u64::MAX, 7..3] {
        match store.get_range("a", range.clone()) {
            Err(StoreError::Range { size: 100, start, end, .. }) => assert_eq!(start..end, range),
            other => panic!("{range:?}: {other:?}"),
        }
    }
}

fn a_file_beyond_the_limit_is_refused_with_its_size(store: &Store) {
    put(store, "a", &noise(100)).unwrap();
    let refusal = store.get("a", 99).unwrap_err();
    assert!(matches!(refusal, StoreError::TooLarge { size: 100, limit: 99, .. }), "{refusal}");
}

fn what_is_not_there_is_not_found(store: &Store) {
    put(store, "folder/file", &noise(3)).unwrap();
    for name in ["nothing", "folder", "folder/nothing", "folder/file/below"] {
        assert_eq!(store.size(name), Ok(None), "{name}");
        for e in [store.get(name, 10).unwrap_err(), store.get_range(name, 0..2).unwrap_err()] {
            assert!(matches!(&e, StoreError::NotFound { path } if path.contains(name)), "{name}: {e}");
        }
        assert!(matches!(store.get_range(name, 0..0), Err(StoreError::NotFound { .. })), "{name}");
    }
    assert_eq!(store.list("nothing"), Ok(vec![]));
}

fn a_put_that_stops_half_way_leaves_nothing(store: &Store) {
    put(store, "old", &noise(3)).unwrap();
    for name in ["old", "new"] {
        let mut given = 0;
        let mut parts = std::iter::from_fn(|| {
            given += 1;
            if given == 4 {
                // A panic without its message.
                resume_unwind(Box::new("the tensor is gone"));
            }
            Some(noise(9 << 20))
        });
        assert!(catch_unwind(AssertUnwindSafe(|| store.put(name, &mut parts))).is_err());
    }
    assert_eq!(store.list(""), Ok(vec!["old".into()]));
    assert_eq!(store.get("old", 10), Ok(noise(3)));
}

fn names_are_listed_folder_by_folder(store: &Store) {
    assert_eq!(store.list(""), Ok(vec![]));
    for name in ["step-2/b", "step-10/a", "step-2/a", "step-2/deep/er", "step-2.json"] {
        put(store, name, &noise(1)).unwrap();
    }
    assert_eq!(store.list(""), Ok(["step-10", "step-2", "step-2.json"].map(String::from).into()));
    assert_eq!(store.list("step-2"), Ok(["a", "b", "deep"].map(String::from).into()));
    assert_eq!(store.list("step-2/deep"), Ok(vec!["er".into()]));
    // A name's beginning is no folder.
    assert_eq!(store.list("step"), Ok(vec![]));
}

fn deleting_takes_a_folder_and_nothing_beside_it(store: &Store) {
    for name in ["step-2/b", "step-2/deep/er", "step-20/a", "step-2.json"] {
        put(store, name, &noise(1)).unwrap();
    }
    for _ in 0..2 {
        store.delete("step-2").unwrap();
        assert_eq!(store.list(""), Ok(["step-2.json", "step-20"].map(String::from).into()));
        assert_eq!(store.size("step-2/deep/er"), Ok(None));
    }
    store.delete("step-2.json").unwrap();
    assert_eq!(store.list(""), Ok(vec!["step-20".into()]));
    store.delete("").unwrap();
    assert_eq!(store.list(""), Ok(vec![]));
    store.delete("").unwrap();
}

fn names_that_lead_out_are_refused(store: &Store) {
    let long = "x".repeat(2000);
    for name in ["..", "a/../b", "/etc/passwd", "a//b", "a/", ".", "a/./b", "a\\b", "a\nb", "a\0b", ".store-x", &long] {
        for e in [
            put(store, name, &noise(1)).unwrap_err(),
            store.get(name, 9).unwrap_err(),
            store.get_range(name, 0..1).unwrap_err(),
            store.size(name).unwrap_err(),
            store.list(name).unwrap_err(),
            store.delete(name).unwrap_err(),
        ] {
            assert!(matches!(e, StoreError::Name { .. }), "{name}: {e}");
        }
    }
    assert!(matches!(store.get("", 9), Err(StoreError::Name { .. })));
}

fn names_may_have_what_is_special_elsewhere(store: &Store) {
    let name = "layer 1/w+b%20&c=#1?äß~'\"";
    put(store, name, &noise(5)).unwrap();
    assert_eq!(store.list("layer 1"), Ok(vec![name.strip_prefix("layer 1/").unwrap().into()]));
    assert_eq!(store.get(name, 5), Ok(noise(5)));
    store.delete("layer 1").unwrap();
    assert_eq!(store.size(name), Ok(None));
}

fn what_is_larger_than_a_request_is_put_and_got_in_pieces(store: &Store) {
    const PIECE: usize = 16 << 20;
    let bytes = noise(2 * PIECE + 1);
    for size in [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 1] {
        // Parts that fit no piece.
        let mut parts = (0..size).step_by(5_000_011).map(|i| bytes.slice(i..size.min(i + 5_000_011)));
        assert_eq!(store.put("large", &mut parts), Ok(size as u64));
        assert_eq!(store.size("large"), Ok(Some(size as u64)));
        assert!(store.get("large", size as u64).unwrap() == bytes.slice(..size), "{size} bytes");
    }
    for (start, end) in [(7, PIECE + 7), (7, PIECE + 8), (PIECE - 1, bytes.len()), (bytes.len() - 1, bytes.len())] {
        let got = store.get_range("large", start as u64..end as u64).unwrap();
        assert!(got == bytes.slice(start..end), "{start}..{end}");
    }
    let beyond = store.get_range("large", 1..bytes.len() as u64 + 1).unwrap_err();
    assert!(matches!(beyond, StoreError::Range { .. }), "{beyond}");
    let refusal = store.get("large", 100).unwrap_err();
    assert!(matches!(refusal, StoreError::TooLarge { limit: 100, .. }), "{refusal}");
    // A smaller one in its place, so that nothing of the old one is left.
    assert_eq!(put(store, "large", &noise(9)), Ok(9));
    assert_eq!(store.get("large", 9), Ok(noise(9)));
}

#[test]
fn a_folder_keeps_the_rules() {
    let dir = tempfile::tempdir().unwrap();
    hold(dir.path().to_str().unwrap());
    hold(&format!("file://{}/by/url", dir.path().display()));
}

#[test]
fn a_store_in_memory_keeps_the_rules() {
    hold("memory://rules");
    hold("memory://rules-below/a/prefix");
}

#[test]
fn a_store_in_memory_is_shared_by_its_name() {
    put(&Store::open("memory://shared/run/7").unwrap(), "a", &noise(4)).unwrap();
    let store = Store::open("memory://shared").unwrap();
    assert_eq!(store.get("run/7/a", 4), Ok(noise(4)));
    assert_eq!(Store::open("memory://another").unwrap().list(""), Ok(vec![]));
    assert!(store.contains("memory://shared/run") && store.contains("memory://shared"));
    let store = Store::open("memory://shared/run/").unwrap();
    assert!(store.contains("memory://shared/run/7") && store.contains("memory://shared/run"));
    for other in ["memory://shared", "memory://shared/runs", "memory://another/run", "s3://shared/run", "/shared/run"] {
        assert!(!store.contains(other), "{other}");
    }
}

#[test]
fn any_thread_may_call_a_store() {
    let call = || {
        let store = Store::open("memory://threads").unwrap();
        put(&store, "a", &noise(3)).unwrap();
        assert_eq!(store.get("a", 3), Ok(noise(3)));
    };
    std::thread::spawn(call).join().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async { call() });
    runtime.block_on(runtime.spawn_blocking(call)).unwrap();
    drop(runtime);
    call();
}

/// Serves S3 on some port, with a bucket, until its input ends; then says what is left of uploads.
#[cfg(feature = "s3")]
const SERVER: &str = r#"
import sys
from urllib.request import Request, urlopen
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
bucket = f"http://{host}:{port}/bucket"
urlopen(Request(bucket, method="PUT"))
print(port, flush=True)
sys.stdin.read()
print(urlopen(bucket + "?uploads").read().decode().count("<Upload>"), "uploads were left unfinished")
"#;

/// Installs the server below the target folder, once. None if this machine cannot.
#[cfg(feature = "s3")]
fn installed() -> Option<std::path::PathBuf> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let done = dir.join("moto");
    if !done.exists() {
        let new = tempfile::tempdir_in(dir).unwrap();
        let python = |args: &[&str]| Command::new("python3").args(args).output().is_ok_and(|o| o.status.success());
        let to = new.path().join("moto");
        let pip =
            ["-m", "pip", "install", "-q", "--retries", "1", "--timeout", "10", "moto[s3]", "flask", "flask-cors"];
        if !python(&[&pip[..], &["--target", to.to_str().unwrap()]].concat()) {
            return None;
        }
        std::fs::rename(to, &done).unwrap();
    }
    Some(done)
}

#[test]
#[cfg(feature = "s3")]
fn an_s3_server_keeps_the_rules() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::Stdio;
    let Some(packages) = installed() else {
        eprintln!("not tested: the packages of an S3 server cannot be installed here");
        return;
    };
    let mut python = Command::new("python3");
    python.args(["-c", SERVER]).env("PYTHONPATH", packages);
    let mut server = python.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let (mut port, mut rest) = (String::new(), String::new());
    let mut output = BufReader::new(server.stdout.take().unwrap());
    output.read_line(&mut port).unwrap();
    assert!(!port.is_empty(), "the S3 server did not start");
    // The variables are a process's: this test's other half is one of its own.
    let half = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_rules_on_the_s3_server_of_the_environment", "--ignored"])
        .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", port.trim()))
        .envs([("AWS_ALLOW_HTTP", "true"), ("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")])
        .output()
        .unwrap();
    drop(server.stdin.take());
    output.read_to_string(&mut rest).unwrap();
    server.wait().unwrap();
    let said = String::from_utf8_lossy(&half.stdout);
    assert!(half.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&half.stderr));
    assert_eq!(rest, "0 uploads were left unfinished\n");
}

#[test]
#[ignore = "an_s3_server_keeps_the_rules starts a server and runs it"]
fn the_rules_on_the_s3_server_of_the_environment() {
    hold("s3://bucket");
    hold("s3://bucket/a/prefix");
    let nowhere = Store::open("s3://no-such-bucket").unwrap();
    let refusal = put(&nowhere, "a", &noise(1)).unwrap_err();
    assert!(matches!(refusal, StoreError::NotFound { .. }), "{refusal}");
}

#[test]
#[cfg(not(feature = "s3"))]
fn without_s3_a_bucket_is_refused_with_the_feature() {
    assert!(Store::open("s3://bucket").unwrap_err().to_string().contains("feature `s3`"));
}

#[test]
fn a_folder_holds_nothing_but_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().to_str().unwrap()).unwrap();
    a_put_that_stops_half_way_leaves_nothing(&store);
    store.delete("").unwrap();
    deleting_takes_a_folder_and_nothing_beside_it(&store);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "hidden files are left");
}

#[test]
fn what_a_deletion_left_that_was_cut_short_goes_with_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().to_str().unwrap()).unwrap();
    let made = |name: &str, age: u64| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.join("it/deep")).unwrap();
        let time = std::time::SystemTime::now() - std::time::Duration::from_secs(age);
        std::fs::File::open(&path).unwrap().set_modified(time).unwrap();
        path
    };
    let (old, young) = (made(".store-gone-a", 3600), made(".store-gone-b", 1));
    assert_eq!(store.list(""), Ok(vec![]), "hidden ones are not listed");
    put(&store, "a", &noise(1)).unwrap();
    store.delete("a").unwrap();
    assert!(!old.exists() && young.exists(), "somebody may still be deleting the young one");
}

#[test]
fn a_full_disk_says_so_and_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let on = |command: &str, args: &[&str]| {
        let done = Command::new(command).args(args).arg(dir.path()).output();
        done.is_ok_and(|o| o.status.success())
    };
    if !on("mount", &["-t", "tmpfs", "-o", "size=1m", "tmpfs"]) {
        eprintln!("not tested: mounting a small file system is not allowed here");
        return;
    }
    let result = catch_unwind(|| {
        let store = Store::open(dir.path().to_str().unwrap()).unwrap();
        put(&store, "a", &noise(1000)).unwrap();
        let full = put(&store, "a", &noise(2 << 20)).unwrap_err();
        assert!(matches!(&full, StoreError::Full { path, .. } if path.ends_with("/a")), "{full}");
        assert_eq!(store.get("a", 1000), Ok(noise(1000)));
        assert_eq!(store.list(""), Ok(vec!["a".into()]));
        // The room is given back.
        assert_eq!(put(&store, "b", &noise(500_000)), Ok(500_000));
    });
    assert!(on("umount", &[]));
    result.unwrap();
}

/// Several workers begin to write below a folder that none of them has made yet.
#[test]
fn a_folder_that_another_makes_this_moment_is_contained() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("a/b/c");
    let store = Store::open(folder.to_str().unwrap()).unwrap();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::remove_dir_all(dir.path().join("a")).unwrap();
            }
        });
        let asked = (0..3000).filter(|_| store.contains(folder.to_str().unwrap())).count();
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(asked, 3000);
    });
}

#[test]
fn what_lies_below_a_folder_is_contained_however_it_is_spelled() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, dir.path().join(name)).unwrap();
    std::fs::create_dir_all(dir.path().join("root/sub")).unwrap();
    std::fs::create_dir(dir.path().join("root-of-another")).unwrap();
    link("/usr", "root/out");
    link("/not/there", "root/dangling");
    link("sub", "root/in");
    link("root", "alias");
    let store = Store::open(&at("root")).unwrap();
    for inside in ["root", "root/", "root/sub/new/newer", "root/sub/..", "root/sub/../x", "root/in/x", "alias/sub"] {
        assert!(store.contains(&at(inside)), "{inside}");
        assert!(store.contains(&format!("file://{}", at(inside))), "{inside}");
    }
    let outside = ["", "root-of-another", "root/..", "root/x/../../y", "root/out", "root/out/lib", "root/dangling/x"];
    for outside in outside.map(at) {
        assert!(!store.contains(&outside), "{outside}");
    }
    for other in ["", "relative", "s3://bucket/x", "memory://x", "ftp://x"] {
        assert!(!store.contains(other), "{other}");
    }
    assert!(Store::open(&at("alias")).unwrap().contains(&at("root/sub")));
    assert!(Store::open("/").unwrap().contains(&at("root")));
}

#[test]
fn locations_are_opened_or_refused_with_what_would_do() {
    let here = std::env::current_dir().unwrap();
    assert_eq!(Path::new(Store::open("runs/x").unwrap().location()), here.join("runs/x"));
    assert_eq!(Store::open("file:///runs/x").unwrap().location(), "/runs/x");
    for bad in ["", "ftp://x/y", "file://host", "file:///a%20b", "s3://", "s3:///x", "s3://b u/x", "s3://b/../x"] {
        let refusal = Store::open(bad).unwrap_err();
        assert!(matches!(refusal, StoreError::Location { .. }), "{bad}: {refusal}");
        assert!(refusal.to_string().contains("s3://bucket/prefix"), "{refusal}");
    }
}
