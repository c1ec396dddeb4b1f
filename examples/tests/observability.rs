//! What a run tells while it runs: status, metrics, traces, and who kept whom waiting.

mod common;

use common::{Place, ran};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

const RUN: &str = "train --data phantom --crop 20x18x16 --base 4 --mesh x=2 --threads 1";

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a server answers: the status line's code, and the body.
fn http(address: &str, method: &str, path: &str) -> (u32, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_string())
}

#[test]
fn a_coordinator_shows_what_it_has_and_lets_workers_go_when_asked() {
    let place = Place::new();
    let mut command = place.command("coordinator --listen 127.0.0.1:0 --status 127.0.0.1:0 --state state");
    let mut coordinator = Process(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let mut lines = BufReader::new(coordinator.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let address = lines.next().unwrap().strip_prefix("listening on ").unwrap().to_string();
    let status = lines.next().unwrap().strip_prefix("status at http://").unwrap().trim_end_matches('/').to_string();
    let worker = || {
        let args = format!("worker --join {address} --devices cpu:1 --threads 1");
        Process(place.command(&args).stderr(Stdio::null()).spawn().unwrap())
    };
    let mut workers = [worker(), worker(), worker()];
    place.ok(&format!("{RUN} --steps 3 --coordinator {address} --out run"));

    assert_eq!(http(&status, "GET", "/healthz"), (200, "ok\n".into()));
    let (code, metrics) = http(&status, "GET", "/metrics");
    assert_eq!(code, 200);
    for line in ["mesh_devices 3", "mesh_workers 3", "mesh_checkpoints_total 1"] {
        assert!(metrics.lines().any(|l| l == line), "no `{line}` in\n{metrics}");
    }
    let (code, page) = http(&status, "GET", "/");
    assert!(code == 200 && page.contains("step-00000003-epoch-"), "{page}");
    for (method, path) in [("POST", "/"), ("DELETE", "/metrics"), ("PUT", "/healthz")] {
        assert_eq!(http(&status, method, path).0, 405, "{method} {path}");
    }
    assert_eq!(http(&status, "GET", "/state").0, 404);

    let table = place.ok(&format!("coordinator status {address}")).out;
    assert!(table.contains("3 workers with 3 devices") && table.contains("newest checkpoint"), "{table}");
    let json =
        || -> Value { serde_json::from_str(&place.ok(&format!("coordinator status {address} --json")).out).unwrap() };
    let number = |v: &Value| v["workers"].as_array().unwrap().len();
    let first = json()["workers"][0]["worker"].as_u64().unwrap();
    place.ok(&format!("coordinator drain {address} {first} --reason test"));
    let begun = Instant::now();
    while number(&json()) > 2 && begun.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(number(&json()), 2);
    let mut left = || workers.iter_mut().filter_map(|w| w.0.try_wait().unwrap()).collect::<Vec<_>>();
    let begun = Instant::now();
    while left().is_empty() && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(left().iter().map(|s| s.code()).collect::<Vec<_>>(), [Some(0)], "the drained worker leaves in peace");
    place.fails(&format!("coordinator drain {address} 99"), 1, &["error[C0038]", "there is no worker 99"]);
    place.fails("coordinator status 127.0.0.1:9", 75, &["error[C0039]"]);
    place.fails("coordinator --listen 127.0.0.1:0 --status 0.0.0.0:0", 2, &["error[W0033]", "0.0.0.0:0"]);
}

/// The events of a trace: those of ops.
fn ops(trace: &Value) -> Vec<&Value> {
    trace.as_array().unwrap().iter().filter(|e| e["ph"] == "X").collect()
}

#[test]
fn a_trace_has_the_last_steps_of_every_device_on_one_clock() {
    let place = Place::new();
    for (name, devices) in [("here", ""), ("workers", "--workers 2")] {
        place.ok(&format!("{RUN} --steps 3 {devices} --out {name} --trace {name}.json"));
        let trace: Value = serde_json::from_slice(&fs::read(place.path(&format!("{name}.json"))).unwrap()).unwrap();
        let ops = ops(&trace);
        let threads: BTreeSet<u64> = ops.iter().map(|e| e["tid"].as_u64().unwrap()).collect();
        assert_eq!(threads, [0, 1].into(), "{name}");
        // The same op of both devices, which wait for each other in it, ends at about one time.
        let last = |device: u64| {
            let of = |e: &&&Value| e["tid"] == device && e["args"]["step"] == 2 && e["cat"] == "communicate";
            let last = ops.iter().rfind(of).unwrap_or_else(|| panic!("{name}: device {device} never communicates"));
            (last["args"]["index"].clone(), last["ts"].as_f64().unwrap() + last["dur"].as_f64().unwrap())
        };
        let ((a, a_end), (b, b_end)) = (last(0), last(1));
        assert_eq!(a, b);
        assert!((a_end - b_end).abs() < 100e3, "{name}: {a_end} us and {b_end} us");
        for device in [0, 1] {
            let mine: Vec<f64> = ops.iter().filter(|e| e["tid"] == device).map(|e| e["ts"].as_f64().unwrap()).collect();
            assert!(mine.len() > 100 && mine.windows(2).all(|w| w[0] <= w[1]), "{name}: {} ops in order", mine.len());
        }
        for row in place.rows(name) {
            let phase = |p: &str| row["phases"][p].as_f64().unwrap();
            let all = phase("feed") + phase("run") + phase("fetch");
            assert!((all - row["step_seconds"].as_f64().unwrap()).abs() < 1e-3, "{row}");
            assert!(phase("communicate") > 0.0 && phase("communicate") <= phase("run"), "{row}");
        }
    }
}

/// The profile of `train` in a run folder, after that of the whole.
fn profile(place: &Place, run: &str) -> [Value; 2] {
    let all: Value = serde_json::from_slice(&fs::read(place.path(run).join("profile.json")).unwrap()).unwrap();
    let train = all["functions"].as_array().unwrap().iter().find(|f| f["function"] == "train").unwrap().clone();
    [all, train]
}

fn keys(v: &Value) -> Vec<&str> {
    v.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The sum of a number of each element of a list.
fn sum(list: &Value, key: &str) -> f64 {
    list.as_array().unwrap().iter().map(|v| v[key].as_f64().unwrap()).sum()
}

#[test]
fn a_profile_says_where_the_time_of_a_step_went_on_devices_here_and_in_workers() {
    let place = Place::new();
    for (name, devices) in [("here", ""), ("workers", "--workers 2")] {
        let said = place.ok(&format!("{RUN} --steps 4 {devices} --out {name} --profile"));
        let text = fs::read_to_string(place.path(name).join("profile.txt")).unwrap();
        assert!(said.out.contains(&text), "{name}: {}", said.out);
        for heading in
            ["profile of the function `train`: ", "of roofline", "steps that take longest", "communication: "]
        {
            assert!(text.contains(heading), "{name}: {text}");
        }
        let row = |op: &str| text.lines().any(|l| l.split_whitespace().next() == Some(op));
        let ops = ["conv", "conv_transpose", "conv_weight_grad", "map", "reduce", "max_pool", "halo", "all-reduce"];
        assert!(ops.into_iter().chain(["outside", "least", "mean", "most"]).all(row), "{name}: {text}");
        assert!(text.contains("examples/src/unet3d/model.rs:"), "{name}: {text}");

        let [all, train] = profile(&place, name);
        assert_eq!((&all["devices"], &all["mesh"]), (&2.into(), &"x=2".into()));
        for speed in ["f32_gflops_per_second", "bf16_gflops_per_second", "memory_gb_per_second"] {
            assert!(all[speed].as_f64().unwrap() > 0.1, "{speed} of {all}");
        }
        let spent = "bytes,calls,flops,gb_per_second,gflops_per_second,ms,op,percent,roofline";
        let expected = [
            (&train, "by_device,communication,function,ms,ops,outside_ms,runs,steps"),
            (&train["ops"][0], spent),
            (
                &train["steps"][0],
                "bytes,calls,extent,flops,gb_per_second,gflops_per_second,ms,op,percent,place,roofline,scope",
            ),
            (&train["communication"], "exposed_ms,kinds,moving_ms,ms,waiting_ms"),
            (&train["by_device"][1], "computing_ms,device,moving_ms,ms,waiting_ms"),
        ];
        for (part, expected) in expected {
            let mut keys = keys(part);
            keys.sort();
            assert_eq!(keys.join(","), expected, "{name}");
        }

        let number = |v: &Value, key: &str| v[key].as_f64().unwrap();
        assert_eq!(train["runs"], 3, "the first is left out");
        let near = |a: f64, b: f64| assert!((a - b).abs() <= 1e-6 * a.abs().max(b.abs()), "{name}: {a} and {b}");
        near(sum(&train["ops"], "ms"), sum(&train["steps"], "ms"));
        near(sum(&train["ops"], "ms"), sum(&train["by_device"], "ms") / 2.0);
        near(sum(&train["ops"], "ms") + number(&train, "outside_ms"), number(&train, "ms"));
        let halo = train["ops"].as_array().unwrap().iter().find(|o| o["op"] == "halo").unwrap();
        assert!(number(halo, "calls") > 1.0 && number(halo, "bytes") > 1.0 && number(halo, "flops") == 0.0, "{halo}");
        let c = &train["communication"];
        near(number(c, "moving_ms") + number(c, "waiting_ms"), number(c, "ms"));
        near(number(c, "exposed_ms"), number(c, "ms"));
        near(number(c, "waiting_ms"), sum(&train["by_device"], "waiting_ms") / 2.0);
        assert!(number(c, "moving_ms") > 0.0 && number(c, "waiting_ms") > 0.0, "{name}: {c}");
        for d in train["by_device"].as_array().unwrap() {
            near(number(d, "computing_ms") + number(d, "moving_ms") + number(d, "waiting_ms"), number(d, "ms"));
        }
    }
}

#[test]
fn the_times_of_a_profile_add_up_to_that_of_the_steps() {
    let place = Place::new();
    let run = RUN.replace("x=2", "1").replace("--base 4", "--base 8");
    place.ok(&format!("{run} --steps 5 --out run --profile"));
    let rows = place.rows("run");
    let run = |row: &Value| row["phases"]["run"].as_f64().unwrap() * 1e3;
    let measured = rows[1..].iter().map(run).sum::<f64>() / (rows.len() - 1) as f64;
    let [_, train] = profile(&place, "run");
    let share = sum(&train["ops"], "ms") / measured;
    assert!((0.90..=1.01).contains(&share), "{share} of {measured} ms");
    assert!(sum(&train["ops"], "percent") <= 100.0 && train["communication"]["ms"] == 0.0, "{train}");
}

#[test]
fn a_run_that_is_not_profiled_writes_no_profile_and_one_of_a_single_step_says_why_it_is_empty() {
    let place = Place::new();
    place.ok(&format!("{RUN} --steps 1 --out plain"));
    assert!(!place.path("plain/profile.json").exists() && !place.path("plain/profile.txt").exists());
    let said = place.ok(&format!("{RUN} --steps 1 --out one --profile")).out;
    assert!(said.contains("nothing ran more than once"), "{said}");
}

#[test]
fn a_session_that_stops_says_who_kept_the_others_waiting() {
    let place = Place::new();
    let mut command = place.command("coordinator --listen 127.0.0.1:0 --state state --replace-timeout 1");
    let mut coordinator = Process(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(coordinator.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.strip_prefix("listening on ").unwrap().trim().to_string();
    let worker = || {
        let args = format!("worker --join {address} --devices cpu:1 --threads 1");
        Process(place.command(&args).stderr(Stdio::null()).spawn().unwrap())
    };
    let workers = [worker(), worker(), worker(), worker()];
    let run = RUN.replace("x=2", "x=2,y=2");
    let args = format!("{run} --steps 100000 --coordinator {address} --out run");
    let child = place.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    let steps = || fs::read_to_string(place.path("run/metrics.jsonl")).unwrap_or_default().lines().count();
    while steps() < 3 && begun.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let id = workers[2].0.id().to_string();
    std::process::Command::new("kill").args(["-STOP", &id]).status().unwrap();
    std::thread::sleep(Duration::from_secs(5));
    drop(workers);
    std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    let said = ran(child.wait_with_output().unwrap()).err;
    let sentence = said.lines().find(|l| l.contains("it was silent for 2s")).unwrap_or_else(|| panic!("{said}"));
    // The book has such a sentence.
    let book = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/observability.md")).unwrap();
    let (_, shown) = book.split_once("\nworker 3 is lost: it was silent for 2s").unwrap();
    let shown = format!("worker 3 is lost{}", shown.split_once("```").unwrap().0.replace('\n', " "));
    for sentence in [sentence, &shown] {
        let (lost, verdict) = sentence.split_once("; ").unwrap_or_else(|| panic!("{sentence}"));
        let worker = lost.split("worker ").nth(1).unwrap().split(' ').next().unwrap();
        assert!(verdict.contains(&format!(" (worker {worker}, lost) was late: device")), "{sentence}");
        // Stopped in a step it is waited for in an op, stopped between two of them after the last one.
        assert!(verdict.contains(" s for it in ") || verdict.contains(" s for it after "), "{sentence}");
        assert!(verdict.contains(" had waited ") && verdict.contains(" of train, step "), "{sentence}");
    }
    // What they did is kept beside the journal.
    let flights = fs::read_dir(place.path("state")).unwrap().map(|e| e.unwrap().path());
    let flight = flights.into_iter().find(|p| p.file_name().unwrap().to_str().unwrap().starts_with("flight-"));
    let trace: Value = serde_json::from_slice(&fs::read(flight.unwrap()).unwrap()).unwrap();
    assert!(ops(&trace).len() >= 100);
}
