//! The flight recorder: what a device did last, kept for whoever wants to know why a step hangs or how long it takes.
//!
//! The device's thread writes, anyone reads at any time: a step that hangs holds the device, and nobody needs the device
//! to read. A ring of slots is filled in turn; `count` says how many events have begun. A reader that sees `count` move
//! on while it copies leaves out what may have been overwritten meanwhile, as with a sequence lock.

use mesh::dim::Name;
use proto::control::{DeviceEvents, Event, FunctionTimes};
use std::sync::LazyLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, fence};
use std::time::{Instant, SystemTime};

/// Events that a device keeps at the least.
pub const EVENTS: usize = 1000;
/// Steps of the longest function that it keeps, if those are more.
pub const STEPS: usize = 4;
/// Events in one message.
const MESSAGE_EVENTS: usize = 8192;

/// Nanoseconds of this process's clock: since 1970 as the system had it when the process began, and never back from there.
pub fn now_ns() -> u64 {
    static BEGIN: LazyLock<(u64, Instant)> = LazyLock::new(|| {
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        (since.as_nanos() as u64, Instant::now())
    });
    BEGIN.0 + BEGIN.1.elapsed().as_nanos() as u64
}

/// An op of a function, as the recorder knows it.
struct Op {
    label: Name,
    communicates: bool,
    /// Nanoseconds spent in it in the runs that [`Recorder::times`] tells of.
    spent: AtomicU64,
    /// Of these, waiting for other devices.
    waited: AtomicU64,
}

/// A function, as the recorder knows it.
struct Function {
    name: Name,
    ops: Vec<Op>,
    /// Runs that have begun.
    runs: AtomicU64,
}

/// An op that has begun. Words rather than fields of their own size: they are written and read one by one.
#[derive(Default)]
struct Slot {
    /// Run, step.
    when: AtomicU64,
    /// Function, index in its list.
    what: AtomicU64,
    begin: AtomicU64,
    /// 0: it has not ended.
    end: AtomicU64,
}

fn pair(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn halves(pair: u64) -> (u32, u32) {
    ((pair >> 32) as u32, pair as u32)
}

/// What a device did last.
pub struct Recorder {
    functions: Vec<Function>,
    ring: Vec<Slot>,
    /// Events that have begun.
    count: AtomicU64,
    /// Functions that were run.
    runs: AtomicU64,
    /// Nanoseconds of the run that is now, or was last, in ops that communicate.
    communicated: AtomicU64,
}

impl Recorder {
    /// That of a device with these functions: the label of every op, and whether it waits for other devices.
    pub fn new(functions: impl IntoIterator<Item = (Name, Vec<(Name, bool)>)>) -> Recorder {
        let zero = || AtomicU64::new(0);
        let op = |(label, communicates)| Op { label, communicates, spent: zero(), waited: zero() };
        let function =
            |(name, ops): (Name, Vec<_>)| Function { name, ops: ops.into_iter().map(op).collect(), runs: zero() };
        let functions: Vec<Function> = functions.into_iter().map(function).collect();
        let longest = functions.iter().map(|f| f.ops.len()).max().unwrap_or(0);
        // One more than are kept: it may be half written.
        let slots = EVENTS.max(STEPS * longest) + 1;
        Recorder {
            functions,
            ring: (0..slots).map(|_| Slot::default()).collect(),
            count: AtomicU64::new(0),
            runs: AtomicU64::new(0),
            communicated: AtomicU64::new(0),
        }
    }

    /// Begins a run of a function, when the device has waited so long for others in all. Only the device's thread calls
    /// this, and what comes of it.
    pub fn run(&self, function: usize, step: u32, waited_ns: u64) -> Recording<'_> {
        let run = self.runs.load(Relaxed) + 1;
        self.runs.store(run, Relaxed);
        self.communicated.store(0, Relaxed);
        let runs = &self.functions[function].runs;
        let warm = runs.load(Relaxed) > 0;
        runs.store(runs.load(Relaxed) + 1, Relaxed);
        let when = pair(run as u32, step);
        Recording { recorder: self, function, when, count: self.count.load(Relaxed), now: now_ns(), waited_ns, warm }
    }

    /// Nanoseconds that the run which is now, or was last, has spent in ops that communicate.
    pub fn communicated_ns(&self) -> u64 {
        self.communicated.load(Relaxed)
    }

    /// How long the ops of each function took in all of its runs but the first, which is slower than those to come. To be
    /// asked between runs.
    pub fn times(&self) -> Vec<FunctionTimes> {
        let times = |f: &Function| FunctionTimes {
            function: f.name.to_string(),
            runs: f.runs.load(Relaxed).saturating_sub(1),
            spent_ns: f.ops.iter().map(|op| op.spent.load(Relaxed)).collect(),
            waited_ns: f.ops.iter().map(|op| op.waited.load(Relaxed)).collect(),
        };
        self.functions.iter().map(times).filter(|t| t.runs > 0).collect()
    }

    /// The events that are kept, oldest first, as messages about device `device`; at least one, and mostly one.
    pub fn events(&self, device: usize) -> Vec<DeviceEvents> {
        let events = self.kept();
        let now_ns = now_ns();
        let message = |events: &[Kept]| {
            let mut labels: Vec<String> = Vec::new();
            // Where an op's label is in `labels`.
            let mut places = std::collections::BTreeMap::new();
            let event = |e: &Kept| {
                let Function { name, ops, .. } = &self.functions[e.function];
                let op = &ops[e.index];
                let label = *places.entry(&op.label).or_insert_with(|| {
                    labels.push(op.label.to_string());
                    labels.len() as u32 - 1
                });
                Event {
                    function: name.to_string(),
                    step: e.step,
                    index: e.index as u32,
                    label,
                    begin_ns: e.begin,
                    end_ns: e.end,
                    communicates: op.communicates,
                    run: e.run,
                }
            };
            let events = events.iter().map(event).collect();
            DeviceEvents { device: device as u32, now_ns, labels, events, worker: 0 }
        };
        if events.is_empty() { vec![message(&[])] } else { events.chunks(MESSAGE_EVENTS).map(message).collect() }
    }

    /// What is in the ring and whole.
    fn kept(&self) -> Vec<Kept> {
        let slots = self.ring.len() as u64;
        let count = self.count.load(Acquire);
        let first = count.saturating_sub(slots - 1);
        let read = |n: u64| {
            let slot = &self.ring[(n % slots) as usize];
            let ((run, step), (function, index)) = (halves(slot.when.load(Relaxed)), halves(slot.what.load(Relaxed)));
            let (begin, end) = (slot.begin.load(Relaxed), slot.end.load(Relaxed));
            Kept { run, step, function: function as usize, index: index as usize, begin, end }
        };
        let mut kept: Vec<Kept> = (first..count).map(read).collect();
        fence(Acquire);
        // By now events up to this one may have been begun, and one more may be half written.
        let overwritten = (self.count.load(Relaxed) + 1).saturating_sub(slots);
        kept.drain(..(overwritten.saturating_sub(first) as usize).min(kept.len()));
        kept
    }
}

/// An event out of the ring.
struct Kept {
    run: u32,
    step: u32,
    function: usize,
    index: usize,
    begin: u64,
    end: u64,
}

/// A run of a function that is being recorded. Ops follow each other: one clock read ends an op and begins the next.
pub struct Recording<'a> {
    recorder: &'a Recorder,
    function: usize,
    when: u64,
    count: u64,
    now: u64,
    waited_ns: u64,
    /// The function ran before.
    warm: bool,
}

impl Recording<'_> {
    /// An op begins, by its place in the function's list.
    pub fn begin(&mut self, index: usize) {
        let r = self.recorder;
        let slot = &r.ring[(self.count % r.ring.len() as u64) as usize];
        // Whoever sees what is written now sees the count as it is before.
        fence(Release);
        slot.when.store(self.when, Relaxed);
        slot.what.store(pair(self.function as u32, index as u32), Relaxed);
        slot.begin.store(self.now, Relaxed);
        slot.end.store(0, Relaxed);
        self.count += 1;
        r.count.store(self.count, Release);
    }

    /// That op has ended, and the device has waited so long for others in all. One that fails never does.
    pub fn end(&mut self, index: usize, waited_ns: u64) {
        let (r, begun, waited) = (self.recorder, self.now, waited_ns - self.waited_ns);
        (self.now, self.waited_ns) = (now_ns(), waited_ns);
        let slot = &r.ring[((self.count - 1) % r.ring.len() as u64) as usize];
        slot.end.store(self.now, Relaxed);
        let op = &r.functions[self.function].ops[index];
        // Nobody else writes.
        let add = |sum: &AtomicU64, ns| sum.store(sum.load(Relaxed) + ns, Relaxed);
        if self.warm {
            add(&op.spent, self.now - begun);
            add(&op.waited, waited);
        }
        if op.communicates {
            add(&r.communicated, self.now - begun);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    fn recorder(ops: usize) -> Recorder {
        let ops = (0..ops).map(|i| (Name::from(format!("op{}", i % 7)), i % 3 == 2)).collect();
        Recorder::new([(Name::from("init"), vec![]), (Name::from("train"), ops)])
    }

    fn run(r: &Recorder, step: u32, ops: std::ops::Range<usize>) {
        let mut recording = r.run(1, step, 0);
        for i in ops {
            recording.begin(i);
            recording.end(i, 0);
        }
    }

    #[test]
    fn the_last_thousand_events_are_kept_in_order() {
        let r = recorder(30);
        assert!(r.events(4)[0].events.is_empty());
        (0..50).for_each(|step| run(&r, step, 0..30));
        let kept = r.events(4).remove(0);
        assert_eq!((kept.device, kept.events.len()), (4, EVENTS));
        let last = kept.events.last().unwrap();
        assert_eq!((last.step, last.index, last.run, &*last.function), (49, 29, 50, "train"));
        for pair in kept.events.windows(2) {
            assert!(pair[0].begin_ns <= pair[0].end_ns && pair[0].end_ns <= pair[1].begin_ns);
            assert_eq!(u64::from(pair[0].step) * 30 + u64::from(pair[0].index) + 1, {
                u64::from(pair[1].step) * 30 + u64::from(pair[1].index)
            });
        }
        for e in &kept.events {
            assert_eq!(kept.labels[e.label as usize], format!("op{}", e.index % 7));
            assert_eq!(e.communicates, e.index % 3 == 2);
        }
        assert!(kept.now_ns >= last.end_ns);
    }

    #[test]
    fn four_steps_of_a_long_function_are_kept_in_messages_of_bounded_size() {
        let r = recorder(2500);
        (0..6).for_each(|step| run(&r, step, 0..2500));
        let messages = r.events(0);
        let events: Vec<&Event> = messages.iter().flat_map(|m| &m.events).collect();
        assert_eq!((messages.len(), events.len(), events[0].step, events[0].index), (2, 10_000, 2, 0));
        assert!(messages.iter().all(|m| m.events.len() <= MESSAGE_EVENTS && m.labels.len() == 7));
    }

    #[test]
    fn an_op_that_has_not_ended_is_there_and_says_so() {
        let r = recorder(3);
        let mut recording = r.run(1, 9, 0);
        recording.begin(0);
        recording.end(0, 0);
        recording.begin(1);
        let events = r.events(0).remove(0).events;
        assert!(events[0].end_ns > 0 && events[1].end_ns == 0 && events[1].begin_ns == events[0].end_ns);
    }

    #[test]
    fn communication_is_that_of_the_last_run_and_times_are_those_of_all_but_the_first() {
        let r = recorder(6);
        let pause = || std::thread::sleep(std::time::Duration::from_millis(2));
        let mut waited = 7_000_000;
        let mut run = |step| {
            let mut recording = r.run(1, step, waited);
            for op in [2, 3] {
                recording.begin(op);
                pause();
                waited += [1_500_000, 0][op - 2];
                recording.end(op, waited);
            }
            assert!((2_000_000..1_000_000_000).contains(&r.communicated_ns()));
        };
        run(0);
        assert!(r.times().is_empty());
        (1..3).for_each(&mut run);
        let [times] = &r.times()[..] else { panic!("one function ran") };
        assert_eq!((&*times.function, times.runs, times.spent_ns.len()), ("train", 2, 6));
        assert_eq!(times.waited_ns, [0, 0, 3_000_000, 0, 0, 0]);
        for (op, spent) in times.spent_ns.iter().enumerate() {
            let expected = if [2, 3].contains(&op) { 4_000_000..1_000_000_000 } else { 0..1 };
            assert!(expected.contains(spent), "{times:?}");
        }
        r.run(1, 3, waited);
        assert_eq!(r.communicated_ns(), 0);
    }

    /// Each event's fields follow from one number, so a slot that is read half old and half new is found out.
    #[test]
    fn a_reader_beside_the_writer_sees_whole_events_only() {
        let (r, over) = (recorder(100), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut step = 0;
                while !over.load(Relaxed) {
                    run(&r, step, 0..100);
                    step += 1;
                }
            });
            let (begun, mut seen) = (Instant::now(), 0);
            while seen < 1_000_000 && begun.elapsed().as_secs() < 10 {
                let kept = r.kept();
                for pair in kept.windows(2) {
                    let number = |k: &Kept| u64::from(k.step) * 100 + k.index as u64;
                    assert_eq!(number(&pair[0]) + 1, number(&pair[1]));
                    assert_eq!(pair[0].run, pair[0].step + 1);
                    assert!(pair[0].end == pair[1].begin || pair[1].index == 0, "{} {}", pair[0].end, pair[1].begin);
                }
                seen += kept.len();
            }
            over.store(true, Relaxed);
            assert!(seen >= 1_000_000, "{seen}");
        });
    }
}
