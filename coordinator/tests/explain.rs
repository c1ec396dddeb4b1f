//! `coordinator explain`, as a process.

use std::process::Command;

fn explain(args: &[&str]) -> (Option<i32>, String, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_coordinator")).arg("explain").args(args).output().unwrap();
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (done.status.code(), text(&done.stdout), text(&done.stderr))
}

#[test]
fn every_code_is_explained_and_others_are_refused_with_those_that_are_near() {
    let (_, list, _) = explain(&[]);
    for (code, about) in mesh::lint::codes() {
        let (done, text, err) = explain(&[code]);
        assert!(done == Some(0) && text.contains(code) && text.contains(about) && list.contains(code), "{code}: {err}");
    }
    let (done, _, err) = explain(&["L0309"]);
    assert_eq!(done, Some(2), "{err}");
    assert!(err.starts_with("error[C0045]: ") && err.contains("did you mean L0009 or L0209 or L0301?"), "{err}");
}
