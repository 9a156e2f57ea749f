//! `/metrics` and `/targets`, made from what is kept, part by part.

use std::fmt::Display;
use std::io::Write;
use std::mem;
use std::sync::Arc;

use hyper::body::Bytes;

use super::device_metrics::{HEARTBEAT, Known, METRICS, Value, find};
use super::list::List;
use super::stream::Source;
use super::watching::Watched;
use crate::discovery::labels::escape;

/// The size of a part of a text, in bytes.
const TEXT_PART: usize = 16 << 10;
/// The name and the meaning of the metric whose value is its labels.
pub const INFO: (&str, &str) = ("balena_device_info", "What the device is, for joining into other series");

/// The metrics of the program, and then of each device: family after family, in each the devices by ascending id.
pub struct Series {
    own: String,
    list: Arc<List>,
    watched: Watched,
    family: Family,
    /// Whether the family has its header.
    begun: bool,
    /// The next device of the list, and the place in what is known of the devices.
    at: [(usize, usize); 2],
}

#[derive(Clone, Copy)]
enum Family {
    Info,
    /// By its place in [`METRICS`].
    Number(usize),
    Heartbeat,
}

impl Series {
    /// The text of the program's own metrics comes first.
    pub fn new(own: String, list: Arc<List>, watched: Watched) -> Self {
        Series { own, list, watched, family: Family::Info, begun: false, at: <_>::default() }
    }
}

impl Source for Series {
    fn append(&mut self, out: &mut Vec<u8>) -> bool {
        out.extend(mem::take(&mut self.own).into_bytes());
        let Some(entry) = self.list.next(&mut self.at[0]) else {
            self.begun = false;
            self.at = <_>::default();
            self.family = match self.family {
                Family::Info => Family::Number(0),
                Family::Number(number) if number + 1 < METRICS.len() => Family::Number(number + 1),
                Family::Number(_) => Family::Heartbeat,
                Family::Heartbeat => return false,
            };
            return true;
        };
        let Some(uuid) = entry.uuid_label() else { return true };
        let (name, about) = match self.family {
            Family::Info => INFO,
            Family::Number(number) => (METRICS[number].name, METRICS[number].about),
            Family::Heartbeat => HEARTBEAT,
        };
        let start = out.len();
        if !self.begun {
            let _ = write!(out, "# HELP {name} {about}.\n# TYPE {name} gauge\n"); // into memory: cannot fail
        }
        let (watched, at) = (&self.watched, &mut self.at[1]);
        let is_there = match self.family {
            Family::Info => {
                let common = entry.common_info.as_deref().unwrap_or_default();
                put(out, [name, "{", &entry.info, common, "} 1\n"]);
                true
            }
            Family::Number(number) => {
                put(out, [name, "{", uuid, "} "]);
                let is_there = match METRICS[number].value {
                    Value::State(of) => {
                        put_number(out, find(&watched.states, at, entry.id).and_then(|it| it.value(of)))
                    }
                    Value::Report(of) => {
                        put_number(out, find(&watched.reports, at, entry.id).and_then(|it| it.value(of)))
                    }
                };
                out.push(b'\n');
                is_there
            }
            Family::Heartbeat => {
                let heartbeat = find(&watched.states, at, entry.id).and_then(Known::heartbeat);
                heartbeat.is_some_and(|state| {
                    put(out, [name, "{", uuid, ",state=\"", &escape(state), "\"} 1\n"]);
                    true
                })
            }
        };
        if is_there {
            self.begun = true;
        } else {
            out.truncate(start);
        }
        true
    }
}

/// Appends a value, and returns whether there is one. Most are whole numbers, which are written several times as fast. An f32 has only
/// as many digits as tell it from its neighbours.
fn put_number<N: Copy + Display + Into<f64>>(out: &mut Vec<u8>, value: Option<N>) -> bool {
    let Some(value) = value else { return false };
    let number = value.into();
    #[allow(clippy::cast_possible_truncation)] // it is whole, and small enough
    let written = if number.fract() == 0.0 && number.abs() < 1e18 {
        write!(out, "{}", number as i64)
    } else {
        write!(out, "{value}")
    };
    written.is_ok() // into memory: cannot fail
}

/// Appends text, at less cost than `write!`.
fn put<const N: usize>(out: &mut Vec<u8>, parts: [&str; N]) {
    for part in parts {
        out.extend_from_slice(part.as_bytes());
    }
}

/// The list as JSON, as the target file has it.
pub struct Targets {
    list: Arc<List>,
    at: (usize, usize),
    begun: bool,
}

impl Targets {
    /// This list.
    pub fn new(list: Arc<List>) -> Self {
        Targets { list, at: <_>::default(), begun: false }
    }
}

impl Source for Targets {
    fn append(&mut self, out: &mut Vec<u8>) -> bool {
        let Some(entry) = self.list.next(&mut self.at) else {
            out.extend_from_slice(if self.begun { b"\n]\n" } else { b"[]\n" });
            return false;
        };
        if !entry.text.is_empty() {
            out.extend_from_slice(if self.begun { b",\n" } else { b"[\n" });
            out.extend_from_slice(&entry.text);
            self.begun = true;
        }
        true
    }
}

/// A list that an earlier run has left.
pub struct Text(pub Bytes);

impl Source for Text {
    fn append(&mut self, out: &mut Vec<u8>) -> bool {
        out.extend_from_slice(&self.0.split_to(self.0.len().min(TEXT_PART)));
        !self.0.is_empty()
    }
}
