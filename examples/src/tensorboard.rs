//! Event files, which `tensorboard --logdir RUN/tensorboard` shows while they grow.
//!
//! A file is a sequence of TFRecords: the length of the data (u64, little-endian), its checksum, the data, their checksum;
//! a checksum is a CRC-32C, rotated and offset so that one of data that hold checksums is sound too. The data are
//! protobuf messages of type `tensorflow.Event`, of which this is the part that scalars need.

use crate::run::{Failed, written};
use prost::Message;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The version of the format, which the first event names.
const VERSION: &str = "brain.Event:2";
/// `SessionLog.SessionStatus.START`.
const START: i32 = 1;

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// An event file that is being written.
pub struct Events {
    path: PathBuf,
    file: fs::File,
}

impl Events {
    /// Begins a file in the folder for the steps from `first` on; what the folder's other files have of them no longer
    /// counts.
    ///
    /// # Errors
    /// A folder or a file that cannot be written.
    pub fn begin(folder: &Path, first: u32) -> Result<Events, Failed> {
        written(folder, fs::create_dir_all(folder))?;
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = if host.trim().is_empty() { "localhost" } else { host.trim() };
        let name = format!("events.out.tfevents.{}.{host}.{}", now() as u64, std::process::id());
        let path = folder.join(name);
        let file = written(&path, fs::File::options().create(true).append(true).open(&path))?;
        let mut events = Events { path, file };
        events.add(0, What::FileVersion(VERSION.into()))?;
        events.add(first, What::SessionLog(SessionLog { status: START }))?;
        Ok(events)
    }

    /// Adds the scalars of a step by their names.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn scalars<'a>(&mut self, step: u32, scalars: impl IntoIterator<Item = (&'a str, f64)>) -> Result<(), Failed> {
        let value = |(tag, v): (&str, f64)| Value { tag: tag.into(), simple_value: Some(v as f32) };
        self.add(step, What::Summary(Summary { value: scalars.into_iter().map(value).collect() }))
    }

    fn add(&mut self, step: u32, what: What) -> Result<(), Failed> {
        let event = Event { wall_time: now(), step: step.into(), what: Some(what) };
        written(&self.path, self.file.write_all(&record(&event.encode_to_vec())))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// A TFRecord of the data.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length, &checksum(&length).to_le_bytes()[..], data, &checksum(data).to_le_bytes()].concat()
}

fn checksum(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), by the byte.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let (mut crc, mut bit) = (i as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !data.iter().fold(!0, |crc: u32, b| (crc >> 8) ^ TABLE[((crc ^ u32::from(*b)) & 0xff) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of a file, its framing checked.
    fn events(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let word = |b: &[u8]| u32::from_le_bytes(b.try_into().unwrap());
            let n = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(word(&rest[8..12]), checksum(&rest[..8]));
            assert_eq!(word(&rest[12 + n..16 + n]), checksum(&rest[12..12 + n]));
            events.push(Event::decode(&rest[12..12 + n]).unwrap());
            rest = &rest[16 + n..];
        }
        events
    }

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, B.4, and the check value of the catalogue of CRCs.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_file_says_its_version_and_where_it_goes_on_and_then_the_scalars_of_each_step() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tensorboard");
        let mut file = Events::begin(&folder, 7).unwrap();
        file.scalars(7, [("loss", 0.5), ("grad_norm", 2.0)]).unwrap();
        file.scalars(8, [("loss", f64::NAN)]).unwrap();
        let path = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
        let name: Vec<String> = path.file_name().unwrap().to_str().unwrap().split('.').map(String::from).collect();
        assert_eq!(name[..3], ["events", "out", "tfevents"]);
        assert!(name[3].parse::<u64>().unwrap() > 1_600_000_000);
        let events = events(&path);
        assert!(events.windows(2).all(|e| e[0].wall_time <= e[1].wall_time) && events[0].wall_time > 1.6e9);
        assert_eq!(events.iter().map(|e| e.step).collect::<Vec<_>>(), [0, 7, 7, 8]);
        assert_eq!(events[0].what, Some(What::FileVersion(VERSION.into())));
        assert_eq!(events[1].what, Some(What::SessionLog(SessionLog { status: START })));
        let Some(What::Summary(summary)) = &events[2].what else { panic!("{events:?}") };
        let scalars: Vec<_> = summary.value.iter().map(|v| (v.tag.as_str(), v.simple_value.unwrap())).collect();
        assert_eq!(scalars, [("loss", 0.5), ("grad_norm", 2.0)]);
        let Some(What::Summary(summary)) = &events[3].what else { panic!("{events:?}") };
        assert!(summary.value[0].simple_value.unwrap().is_nan());
    }
}
