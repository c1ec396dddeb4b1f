//! What a machine can do: how fast a device computes, and how fast devices reach each other.
//!
//! A description is a TOML file: one of the presets, or one that `coordinator calibrate` measured. Devices are numbered
//! host by host. The time of a piece of work is a straight line, `launch + flops / rate + bytes / rate`: two numbers of the
//! work, known without running it, and three of the machine for each kind of work.

use crate::dim::DType;
use crate::error::{Cause, Error, nearest};
use crate::plan::cost::Cost;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Machines that are known by name, as files of their own.
const PRESETS: [(&str, &str); 2] =
    [("a100", include_str!("machines/a100.toml")), ("h100", include_str!("machines/h100.toml"))];
/// The longest description.
const TEXT_BYTES: usize = 1 << 16;

/// A machine: hosts of equal devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// What it is called.
    pub name: String,
    /// Devices of a host.
    pub devices: usize,
    /// Hosts there are; None for as many as a mesh has devices for. Devices of a mesh beyond those of all hosts share
    /// them: each then has its part of one's speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<usize>,
    /// Bytes of memory of a device.
    pub memory: usize,
    /// Columns of a matrix tile: results with fewer innermost elements take as long as with so many.
    #[serde(default = "one")]
    pub columns: usize,
    /// To begin and to finish a sum in a matrix tile takes as long as so many more elements of `f32`.
    #[serde(default)]
    pub depth: usize,
    /// Seconds that a run of a function takes beside its steps.
    #[serde(default)]
    pub step: f64,
    /// By kind of work, as profiles call it; of what is not listed `product` is for products, `collective` for what passes
    /// between devices, and `default` for all else.
    pub rates: BTreeMap<String, Rate>,
    /// Between devices of a host.
    pub within: Link,
    /// Between devices of different hosts.
    pub between: Link,
}

fn one() -> usize {
    1
}

/// How fast a device does a kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Seconds that each piece of work takes, however small.
    pub launch: f64,
    /// Operations a second.
    pub flops: f64,
    /// Operations a second on factors of `bf16`.
    pub flops_bf16: f64,
    /// Operations a second on factors of `f16`; None for those of `f32`, which CPUs multiply them in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flops_f16: Option<f64>,
    /// Bytes a second.
    pub bytes: f64,
}

/// How fast devices reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Seconds from a device to another for a message, however small.
    pub latency: f64,
    /// Bytes a second that a device sends while it receives as many.
    pub bytes: f64,
}

impl Rate {
    /// Seconds of a piece of work.
    pub fn seconds(&self, cost: Cost, dtype: DType) -> f64 {
        let flops = match dtype {
            DType::Bf16 => self.flops_bf16,
            DType::F16 => self.flops_f16.unwrap_or(self.flops),
            DType::F32 | DType::I32 | DType::Bool => self.flops,
        };
        self.launch + cost.flops / flops + cost.bytes / self.bytes
    }
}

impl Machine {
    /// The names of the presets.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|(name, _)| *name)
    }

    /// A preset with a number of devices: `h100x16`; how many there are is None if that is not said, as in `h100`.
    ///
    /// # Errors
    /// A name that is no preset's, with the nearest one; a number of devices that is none.
    pub fn named(text: &str) -> Result<(Machine, Option<usize>), Error> {
        let (name, devices) = match text.rsplit_once('x') {
            Some((name, devices)) if PRESETS.iter().any(|(n, _)| *n == name) => (name, Some(devices)),
            _ => (text, None),
        };
        let expected = || {
            let names: Vec<&str> = Machine::presets().collect();
            let near = nearest(name, names.iter().copied()).filter(|n| *n != name);
            let near = near.map_or(String::new(), |n| format!(" (did you mean `{n}`?)"));
            format!(
                "a machine: {} with a number of devices, such as `h100x16`, or a file that `coordinator calibrate` has \
                 written{near}",
                names.join(" or ")
            )
        };
        let syntax = || Error::from(Cause::Syntax { text: text.into(), expected: expected() });
        let (_, toml) = PRESETS.iter().find(|(n, _)| *n == name).ok_or_else(syntax)?;
        let devices = devices.map(|d| d.parse().ok().filter(|d| (1..=1 << 20).contains(d)).ok_or_else(syntax));
        Ok((Machine::from_toml(toml)?, devices.transpose()?))
    }

    /// Reads a description.
    ///
    /// # Errors
    /// What is no description, with the place in it; numbers that are not above zero; no rate for `default`.
    pub fn from_toml(text: &str) -> Result<Machine, Error> {
        let wrong = |what: &str, why: String| {
            let expected = format!("the description of a machine: {why}");
            Error::from(Cause::Syntax { text: what.into(), expected })
        };
        if text.len() > TEXT_BYTES {
            return Err(wrong("..", format!("at most {TEXT_BYTES} bytes")));
        }
        let machine: Machine = toml::from_str(text).map_err(|e| {
            let line =
                e.span().map_or(0, |s| text.get(..s.start).unwrap_or_default().lines().count().saturating_sub(1));
            let why = format!("{} (line {})", e.message(), line + 1);
            wrong(text.lines().nth(line).unwrap_or_default(), why)
        })?;
        let rates = machine.rates.iter().flat_map(|(class, r)| {
            let f16 = r.flops_f16.unwrap_or(r.flops);
            [("flops", r.flops), ("flops_bf16", r.flops_bf16), ("flops_f16", f16), ("bytes", r.bytes)]
                .map(|(n, v)| (format!("{class}.{n}"), v))
        });
        let links = [("within", machine.within), ("between", machine.between)];
        let hosts = machine.hosts.unwrap_or(1);
        let counts =
            [("hosts", hosts), ("devices", machine.devices), ("memory", machine.memory), ("columns", machine.columns)];
        let positive = rates
            .chain(links.iter().map(|(n, l)| (format!("{n}.bytes"), l.bytes)))
            .chain(counts.map(|(n, v)| (n.to_string(), v as f64)));
        for (name, v) in positive {
            if !(v > 0.0 && v <= 1e30) {
                return Err(wrong(&format!("{name} = {v}"), "a number above zero".into()));
            }
        }
        let waits = machine.rates.iter().map(|(class, r)| (format!("{class}.launch"), r.launch));
        let waits = waits.chain(links.iter().map(|(n, l)| (format!("{n}.latency"), l.latency)));
        for (name, v) in waits.chain([("step".into(), machine.step)]) {
            if !(0.0..=1e3).contains(&v) {
                return Err(wrong(&format!("{name} = {v}"), "seconds, not below zero".into()));
            }
        }
        if !machine.rates.contains_key("default") {
            return Err(wrong("rates", "a rate `default`".into()));
        }
        Ok(machine)
    }

    /// The description as a file.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_default()
    }

    /// How fast a device does a kind of work; if that is not listed, work of its `family`.
    pub fn rate(&self, class: &str, family: &str) -> Rate {
        let found = [class, family, "default"].into_iter().find_map(|c| self.rates.get(c));
        // There is always a default, by `from_toml`.
        found.copied().unwrap_or(Rate { launch: 0.0, flops: 1e9, flops_bf16: 1e9, flops_f16: None, bytes: 1e9 })
    }

    /// Of a mesh of so many devices: how many are on a host, and how many of them share one of the machine's.
    pub fn share(&self, mesh_devices: usize) -> (usize, f64) {
        let hosts = self.hosts.unwrap_or_else(|| mesh_devices.div_ceil(self.devices)).max(1);
        let each = mesh_devices.div_ceil(hosts);
        (each, (each as f64 / self.devices as f64).max(1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_read_back_as_they_are_written() {
        for name in Machine::presets() {
            let (machine, devices) = Machine::named(name).unwrap();
            assert_eq!((machine.name.as_str(), devices), (name, None));
            assert_eq!(Machine::from_toml(&machine.to_toml()).unwrap(), machine);
        }
        let (machine, devices) = Machine::named("h100x16").unwrap();
        assert_eq!((machine.devices, devices), (8, Some(16)));
    }

    #[test]
    fn what_is_no_machine_is_refused_with_what_is_wrong() {
        assert!(!Machine::named("h100x0").unwrap_err().to_string().contains("did you mean"));
        for (text, says) in [
            ("h10x4", "did you mean `h100`?"),
            ("h100x", "such as `h100x16`, or a file that `coordinator calibrate` has written"),
            ("h100x0", "with a number of devices"),
            ("h100x99999999", "with a number of devices"),
            ("", "h100"),
        ] {
            let e = Machine::named(text).unwrap_err().to_string();
            assert!(e.contains(says), "{text}: {e}");
        }
        let good = Machine::named("a100").unwrap().0.to_toml();
        for (from, to, says) in [
            ("devices = 8", "devices = 0", "above zero"),
            ("devices = 8", "device = 8", "unknown field `device`"),
            ("step = ", "step = -", "not below zero"),
            ("[rates.default]", "[rates.other]", "a rate `default`"),
            ("devices = 8", "devices = ", "line 2"),
        ] {
            assert!(good.contains(from));
            let e = Machine::from_toml(&good.replace(from, to)).unwrap_err().to_string();
            assert!(e.contains(says), "{to}: {e}");
        }
        assert!(Machine::from_toml(&"#".repeat(TEXT_BYTES + 1)).is_err());
    }

    #[test]
    fn devices_beyond_those_of_a_host_are_on_others_or_share() {
        let (machine, _) = Machine::named("h100").unwrap();
        assert_eq!([16, 3].map(|n| machine.share(n)), [(8, 1.0), (3, 1.0)]);
        assert_eq!(Machine { hosts: Some(1), ..machine }.share(16), (16, 2.0));
    }
}
