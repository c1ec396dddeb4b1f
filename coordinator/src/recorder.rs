//! What is made of the devices' flight recorders: who kept whom waiting when a session stopped, and traces.

use crate::crew::{Active, blocking};
use crate::server::Coordinator;
use proto::control::{DeviceEvents, Event, EventsRequest, worker_client::WorkerClient};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_stream::StreamExt;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use worker::recorder::now_ns;

/// How long workers have to say what their devices did when a session stops: all others wait meanwhile.
const WITHIN: Duration = Duration::from_secs(1);
/// Most events that are taken from a worker.
const EVENTS: usize = 1 << 20;
/// Files of stopped sessions that are kept.
const FILES: usize = 5;
const PREFIX: &str = "flight-";

/// A device when its session stopped.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flight {
    pub device: u32,
    pub worker: u64,
    /// What it did last; empty if its worker is lost, or does not answer.
    pub events: Vec<DeviceEvents>,
}

impl Flight {
    fn last(&self) -> Option<(&DeviceEvents, &Event)> {
        self.events.iter().rev().find_map(|part| Some((part, part.events.last()?)))
    }

    /// How far it is: run, op, and whether that has ended.
    fn position(&self) -> Option<(u32, u32, bool)> {
        let at = |e: &Event| (e.run, e.index, e.end_ns > 0);
        (!self.events.is_empty()).then(|| self.last().map_or((0, 0, false), |(_, e)| at(e)))
    }

    /// For how many nanoseconds it has waited for others: in an op that communicates, or after its last one.
    fn waits(&self) -> Option<u64> {
        let (part, event) = self.last().filter(|(_, e)| e.communicates || e.end_ns > 0)?;
        Some(part.now_ns.saturating_sub(event.begin_ns.max(event.end_ns)))
    }

    /// `in halo encoder.0/conv.1 of train, step 17`; `after ..` once that has ended.
    fn place(&self) -> Option<String> {
        let (part, e) = self.last()?;
        let at = if e.end_ns > 0 { "after" } else { "in" };
        Some(format!("{at} {} of {}, step {}", label(part, e), e.function, e.step))
    }
}

fn label<'a>(part: &'a DeviceEvents, event: &Event) -> &'a str {
    part.labels.get(event.label as usize).map_or("?", String::as_str)
}

/// `a`, `a and b`, `a, b and c`.
fn listed(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// `device 2`, `devices 0 and 1`.
fn devices(flights: &[&Flight]) -> String {
    let numbers: Vec<String> = flights.iter().map(|f| f.device.to_string()).collect();
    format!("device{} {}", if numbers.len() == 1 { "" } else { "s" }, listed(&numbers))
}

/// `devices 2 and 3 (worker 3, lost)`
fn with_workers(flights: &[&Flight]) -> String {
    let workers: BTreeSet<u64> = flights.iter().map(|f| f.worker).collect();
    let of = |worker: &u64| {
        let own: Vec<&Flight> = flights.iter().filter(|f| f.worker == *worker).copied().collect();
        let lost = if own.iter().all(|f| f.events.is_empty()) { ", lost" } else { "" };
        format!("{} (worker {worker}{lost})", devices(&own))
    };
    listed(&workers.iter().map(of).collect::<Vec<_>>())
}

fn time(ns: u64) -> String {
    let s = ns as f64 / 1e9;
    if s < 0.1 { format!("{:.1} ms", s * 1e3) } else { format!("{s:.1} s") }
}

/// Who kept whom waiting, in one sentence. The device that is furthest behind is late, or those of which nothing is
/// heard; None if nothing at all is known.
pub(crate) fn verdict(flights: &[Flight]) -> Option<String> {
    let (lost, there): (Vec<&Flight>, Vec<&Flight>) = flights.iter().partition(|f| f.position().is_none());
    let furthest = there.iter().map(|f| f.position()).max()?;
    let behind = there.iter().map(|f| f.position()).min()?;
    let late: Vec<&Flight> = match behind {
        _ if !lost.is_empty() => lost,
        _ if behind == furthest => vec![],
        _ => there.iter().filter(|f| f.position() == behind).copied().collect(),
    };
    let punctual = |f: &&&Flight| late.iter().all(|l| l.device != f.device);
    let waiting: Vec<&Flight> = there.iter().filter(punctual).filter(|f| f.waits().is_some()).copied().collect();
    // Others may have come further, until they waited for those that wait.
    let Some(first) = waiting.iter().min_by_key(|f| f.position()) else {
        let place = there.iter().max_by_key(|f| f.position())?.place()?;
        let what = match late.is_empty() {
            true => "no device waited for another".into(),
            false => format!("{} kept no other device waiting", with_workers(&late)),
        };
        return Some(format!("{what}: the furthest was {place}"));
    };
    let (here, further): (Vec<&Flight>, Vec<&Flight>) =
        waiting.iter().copied().partition(|f| f.position() == first.position());
    let longest = here.iter().filter_map(|f| f.waits()).max().unwrap_or(0);
    let place = first.place()?;
    if late.is_empty() {
        // Those that are done wait for the next step, and not for each other.
        let whom = if place.starts_with("in") { " for each other" } else { "" };
        return Some(format!("no device was late: {} had waited {}{whom} {place}", devices(&here), time(longest)));
    }
    let one = late.len() == 1;
    let doing = match late[0].last() {
        Some((part, e)) if e.end_ns == 0 => format!(", still in {}", label(part, e)),
        _ => String::new(),
    };
    let others = if further.is_empty() { String::new() } else { format!(", and {} for them", devices(&further)) };
    Some(format!(
        "{} {} late{doing}: {} had waited {} for {} {place}{others}",
        with_workers(&late),
        if one { "was" } else { "were" },
        devices(&here),
        time(longest),
        if one { "it" } else { "them" },
    ))
}

/// A trace for Perfetto or Chrome: an array of complete events, a process for each worker and a thread for each device.
/// Its time begins with its first event; an op that had not ended lasts until the trace was asked for.
pub fn trace(devices: &[DeviceEvents]) -> Value {
    let begin = devices.iter().flat_map(|d| &d.events).map(|e| e.begin_ns).min().unwrap_or(0);
    let us = |ns: u64| ns as f64 / 1e3;
    let mut all = Vec::new();
    let mut named = BTreeSet::new();
    for part in devices {
        let (worker, device) = (part.worker, part.device);
        let name = |what: &str, name: String| json!({"ph": "M", "name": what, "pid": worker, "tid": device, "args": {"name": name}});
        if named.insert((worker, device)) {
            all.push(name(
                "process_name",
                if worker == 0 { "this process".into() } else { format!("worker {worker}") },
            ));
            all.push(name("thread_name", format!("device {device}")));
        }
        for e in &part.events {
            let end = if e.end_ns > 0 { e.end_ns } else { part.now_ns };
            let mut args = json!({"function": e.function, "step": e.step, "run": e.run, "index": e.index});
            if e.end_ns == 0 {
                args["unfinished"] = true.into();
            }
            all.push(json!({
                "ph": "X",
                "name": label(part, e),
                "cat": if e.communicates { "communicate" } else { "compute" },
                "pid": worker,
                "tid": device,
                "ts": us(e.begin_ns.saturating_sub(begin)),
                "dur": us(end.saturating_sub(e.begin_ns)),
                "args": args,
            }));
        }
    }
    all.into()
}

/// Takes what comes of devices' events, on this process's clock: the answer's is taken for the middle between `asked` and
/// its arrival.
pub(crate) async fn collect(mut stream: Streaming<DeviceEvents>, asked: u64) -> Result<Vec<DeviceEvents>, Status> {
    let (mut parts, mut shift, mut count) = (Vec::new(), None, 0);
    while let Some(part) = stream.next().await {
        let mut part: DeviceEvents = part?;
        count += part.events.len() + 1;
        if count > EVENTS {
            return Err(Status::resource_exhausted("C0037: events of devices beyond all bounds"));
        }
        let middle = asked + (now_ns() - asked) / 2;
        let shift = *shift.get_or_insert(middle.wrapping_sub(part.now_ns));
        part.now_ns = part.now_ns.wrapping_add(shift);
        for e in &mut part.events {
            e.begin_ns = e.begin_ns.wrapping_add(shift);
            if e.end_ns > 0 {
                e.end_ns = e.end_ns.wrapping_add(shift).max(1);
            }
        }
        parts.push(part);
    }
    Ok(parts)
}

/// What a worker's devices did.
async fn of_worker(mut client: WorkerClient<Channel>, epoch: u64) -> Result<Vec<DeviceEvents>, Status> {
    let asked = now_ns();
    collect(client.events(EventsRequest { epoch }).await?.into_inner(), asked).await
}

impl Coordinator {
    /// What a session's devices did last, on this process's clock; without those of workers that do not say so in time.
    pub(crate) async fn gather_events(&self, session: &Active, within: Duration) -> Vec<DeviceEvents> {
        let end = Instant::now() + within;
        let mut calls = JoinSet::new();
        for (worker, own) in session.crew.clone() {
            let Some(client) = self.state().members.get(&worker).map(|m| m.client.clone()) else { continue };
            let epoch = session.epoch;
            calls.spawn(async move {
                let parts = timeout_at(end, of_worker(client, epoch)).await.unwrap_or_else(|_| Ok(vec![]))?;
                let own = parts.into_iter().filter(|p| own.contains(&p.device));
                Ok::<_, Status>(own.map(|p| DeviceEvents { worker, ..p }).collect::<Vec<_>>())
            });
        }
        let mut parts = Vec::new();
        while let Some(done) = calls.join_next().await {
            match done {
                Ok(Ok(own)) => parts.extend(own),
                // Of a worker that is about to be lost.
                Ok(Err(status)) => tracing::debug!("a worker does not say what its devices did: {status}"),
                Err(e) => tracing::debug!("{e}"),
            }
        }
        parts
    }

    /// The same for a session that stops, by device.
    pub(crate) async fn flights(&self, session: &Active) -> Vec<Flight> {
        let parts = self.gather_events(session, WITHIN).await;
        let devices = session.crew.iter().flat_map(|(worker, own)| own.iter().map(move |device| (*worker, *device)));
        let flight = |(worker, device): (u64, u32)| {
            let events = parts.iter().filter(|p| p.device == device).cloned().collect();
            Flight { device, worker, events }
        };
        devices.map(flight).collect()
    }

    /// Keeps that beside the journal, if there is one.
    pub(crate) async fn keep(&self, epoch: u64, flights: Vec<Flight>) {
        let Some(dir) = self.options.state.clone() else { return };
        let write = move || {
            let parts: Vec<DeviceEvents> = flights.into_iter().flat_map(|f| f.events).collect();
            let name = format!("{PREFIX}{epoch}.json");
            match keep(&dir, &name, &trace(&parts)) {
                Ok(()) => tracing::info!(epoch, "what the devices did last is in {}", dir.join(name).display()),
                Err(e) => tracing::error!("cannot write {}: {e}", dir.join(name).display()),
            }
            Ok(())
        };
        // It says itself what went wrong.
        let _ = blocking(write).await;
    }
}

/// Writes a file of a stopped session, and deletes all but the newest ones.
fn keep(dir: &Path, name: &str, trace: &Value) -> io::Result<()> {
    let hidden = dir.join(format!(".{name}"));
    std::fs::write(&hidden, trace.to_string())?;
    std::fs::rename(&hidden, dir.join(name))?;
    let epoch = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        name.strip_prefix(PREFIX)?.strip_suffix(".json")?.parse::<u64>().ok()
    };
    let entries = std::fs::read_dir(dir)?.filter_map(|e| e.ok().map(|e| e.path()));
    let mut files: Vec<_> = entries.filter_map(|path| Some((epoch(&path)?, path))).collect();
    files.sort();
    let old = files.len().saturating_sub(FILES);
    files[..old].iter().try_for_each(|(_, path)| std::fs::remove_file(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    /// A device in run 18 (train, step 17), asked at 100 s: ops that it has done up to `op`, which began at `begun` seconds.
    fn at(device: u32, worker: u64, op: u32, begun: f64, ended: bool) -> Flight {
        let labels = ["map", "halo encoder.0/conv.1", "conv encoder.0/conv.1", "all-reduce loss"].map(String::from);
        let event = |index: u32, begin_ns: u64, end_ns: u64| Event {
            function: "train".into(),
            step: 17,
            index,
            label: index % 4,
            begin_ns,
            end_ns,
            communicates: index % 2 == 1,
            run: 18,
        };
        let begun = (begun * S as f64) as u64;
        let mut events: Vec<Event> = (0..op).map(|i| event(i, begun - S, begun)).collect();
        events.push(event(op, begun, if ended { begun + S / 1000 } else { 0 }));
        let part = DeviceEvents { device, now_ns: 100 * S, labels: labels.to_vec(), events, worker };
        Flight { device, worker, events: vec![part] }
    }

    fn lost(device: u32, worker: u64) -> Flight {
        Flight { device, worker, events: vec![] }
    }

    fn idle(device: u32, worker: u64) -> Flight {
        Flight { device, worker, events: vec![DeviceEvents { device, now_ns: 100 * S, ..DeviceEvents::default() }] }
    }

    #[test]
    fn the_late_device_and_those_that_waited_for_it_are_named_in_one_sentence() {
        for (flights, expected) in [
            (
                vec![at(0, 1, 1, 98.1, false), at(1, 2, 1, 98.2, false), lost(2, 3), at(3, 4, 1, 98.1, false)],
                "device 2 (worker 3, lost) was late: devices 0, 1 and 3 had waited 1.9 s for it in halo \
                 encoder.0/conv.1 of train, step 17",
            ),
            (
                vec![at(0, 1, 1, 98.0, false), at(1, 1, 3, 99.0, false), lost(2, 2), lost(3, 2)],
                "devices 2 and 3 (worker 2, lost) were late: device 0 had waited 2.0 s for them in halo \
                 encoder.0/conv.1 of train, step 17, and device 1 for them",
            ),
            (
                vec![lost(0, 1), lost(1, 2), at(2, 3, 3, 99.95, false)],
                "device 0 (worker 1, lost) and device 1 (worker 2, lost) were late: device 2 had waited 50.0 ms for \
                 them in all-reduce loss of train, step 17",
            ),
            (
                vec![at(0, 1, 3, 90.0, false), at(1, 2, 2, 89.0, false), at(2, 3, 3, 95.0, false)],
                "device 1 (worker 2) was late, still in conv encoder.0/conv.1: devices 0 and 2 had waited 10.0 s for \
                 it in all-reduce loss of train, step 17",
            ),
            (
                vec![at(0, 1, 1, 90.0, false), idle(1, 2)],
                "device 1 (worker 2) was late: device 0 had waited 10.0 s for it in halo encoder.0/conv.1 of train, \
                 step 17",
            ),
            (
                vec![at(0, 1, 1, 90.0, false), at(1, 2, 1, 91.0, false)],
                "no device was late: devices 0 and 1 had waited 10.0 s for each other in halo encoder.0/conv.1 of \
                 train, step 17",
            ),
            (
                vec![at(0, 1, 3, 90.0, true), at(1, 2, 3, 90.0, true)],
                "no device was late: devices 0 and 1 had waited 10.0 s after all-reduce loss of train, step 17",
            ),
            (
                vec![at(0, 1, 3, 90.0, true), lost(1, 2)],
                "device 1 (worker 2, lost) was late: device 0 had waited 10.0 s for it after all-reduce loss of train, \
                 step 17",
            ),
            (
                vec![at(0, 1, 3, 90.0, true), at(1, 2, 2, 89.0, false)],
                "device 1 (worker 2) was late, still in conv encoder.0/conv.1: device 0 had waited 10.0 s for it \
                 after all-reduce loss of train, step 17",
            ),
            (
                vec![at(0, 1, 2, 90.0, false), lost(1, 2)],
                "device 1 (worker 2, lost) kept no other device waiting: the furthest was in conv encoder.0/conv.1 of \
                 train, step 17",
            ),
        ] {
            assert_eq!(verdict(&flights).as_deref(), Some(expected));
        }
        assert_eq!(verdict(&[lost(0, 1), lost(1, 2)]), None);
        assert_eq!(verdict(&[idle(0, 1), idle(1, 2)]), None);
    }

    /// `eval` begins at step 0 again: what counts is the order in which functions ran.
    #[test]
    fn a_device_in_a_later_run_is_ahead_even_if_its_step_is_lower() {
        let mut ahead = at(0, 1, 1, 98.0, false);
        for e in &mut ahead.events[0].events {
            (e.function, e.step, e.run) = ("eval".into(), 0, 19);
        }
        let said = verdict(&[ahead, at(1, 2, 3, 97.0, true)]).unwrap();
        assert!(said.starts_with("device 1 (worker 2) was late: device 0 had waited 2.0 s for it in halo"), "{said}");
        assert!(said.ends_with("of eval, step 0"), "{said}");
    }

    #[test]
    fn events_that_make_no_sense_are_still_a_sentence_and_a_trace() {
        let mut odd = at(1, 2, 1, 99.0, false);
        odd.events[0].now_ns = 0;
        odd.events[0].events[1].label = u32::MAX;
        let said = verdict(&[odd.clone(), lost(0, 1)]).unwrap();
        assert!(said.contains("device 1 had waited 0.0 ms for it in ? of train"), "{said}");
        assert_eq!(trace(&odd.events).as_array().unwrap().len(), 4);
    }

    #[test]
    fn a_trace_begins_with_its_first_event_and_names_processes_and_threads() {
        let parts: Vec<DeviceEvents> =
            [at(0, 1, 1, 99.5, false), at(1, 2, 1, 99.0, true)].into_iter().flat_map(|f| f.events).collect();
        let trace = trace(&parts);
        let events = trace.as_array().unwrap();
        let named: Vec<&str> =
            events.iter().filter(|e| e["ph"] == "M").map(|e| e["args"]["name"].as_str().unwrap()).collect();
        assert_eq!(named, ["worker 1", "device 0", "worker 2", "device 1"]);
        let complete: Vec<&Value> = events.iter().filter(|e| e["ph"] == "X").collect();
        assert_eq!(complete.len(), 4);
        assert_eq!((&complete[2]["ts"], &complete[0]["ts"]), (&json!(0.0), &json!(500_000.0)));
        let waits = complete[1];
        assert_eq!((&waits["name"], &waits["cat"]), (&json!("halo encoder.0/conv.1"), &json!("communicate")));
        assert_eq!((&waits["pid"], &waits["tid"], &waits["dur"]), (&json!(1), &json!(0), &json!(500_000.0)));
        assert_eq!(waits["args"], json!({"function": "train", "step": 17, "run": 18, "index": 1, "unfinished": true}));
    }

    #[test]
    fn the_files_of_the_last_five_stopped_sessions_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("journal.jsonl"), "").unwrap();
        for epoch in [2, 9, 10, 11, 30, 100, 101] {
            keep(dir.path(), &format!("{PREFIX}{epoch}.json"), &json!([])).unwrap();
        }
        let mut names: Vec<String> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        let expected = [10, 100, 101, 11, 30].map(|e| format!("flight-{e}.json"));
        assert_eq!(names, [&expected[..], &["journal.jsonl".into()]].concat());
    }
}
