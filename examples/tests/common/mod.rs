//! A model program, started as a process in a folder of its own.
#![allow(dead_code, reason = "each test uses some of them")]

use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use tempfile::TempDir;

/// A folder to run in, with an empty cache: nothing here may need the network.
pub struct Place(TempDir, &'static str);

pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Place {
    /// For `unet3d`.
    pub fn new() -> Place {
        Place::of(env!("CARGO_BIN_EXE_unet3d"))
    }

    /// For that program.
    pub fn of(program: &'static str) -> Place {
        Place(tempfile::tempdir().unwrap(), program)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn command(&self, args: &str) -> Command {
        let mut c = Command::new(self.1);
        c.current_dir(self.0.path()).env("XDG_CACHE_HOME", self.path("cache")).args(args.split_whitespace());
        c
    }

    pub fn run(&self, args: &str) -> Ran {
        ran(self.command(args).output().unwrap())
    }

    /// Runs what must succeed.
    pub fn ok(&self, args: &str) -> Ran {
        let r = self.run(args);
        assert_eq!(r.code, 0, "`{args}` failed:\n{}{}", r.out, r.err);
        r
    }

    /// Runs what must fail with that code, and with all of those texts.
    pub fn fails(&self, args: &str, code: i32, texts: &[&str]) {
        let r = self.run(args);
        assert_eq!(r.code, code, "`{args}`:\n{}{}", r.out, r.err);
        for t in texts {
            assert!(r.err.contains(t), "`{args}` does not say `{t}`:\n{}", r.err);
        }
        assert!(!r.err.contains("panicked"), "{}", r.err);
    }

    pub fn rows(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    }
}

pub fn ran(o: Output) -> Ran {
    Ran {
        code: o.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&o.stdout).into(),
        err: String::from_utf8_lossy(&o.stderr).into(),
    }
}

/// What must not depend on mesh or layout: of every row the bits, and the hash of the last one.
pub fn bits(rows: &[Value]) -> Vec<[&Value; 5]> {
    rows.iter()
        .map(|r| [&r["step"], &r["loss_bits"], &r["grad_norm_bits"], &r["sample_ids"], &r["variables_hash"]])
        .collect()
}
