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

#[test]
fn a_folder_keeps_the_rules() {
    let dir = tempfile::tempdir().unwrap();
    hold(dir.path().to_str().unwrap());
    hold(&format!("file://{}/by/url", dir.path().display()));
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
