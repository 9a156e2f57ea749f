//! `/metrics` and `/targets`, made from what is kept, part by part.

use std::fmt::Display;
use std::io::Write;
use std::mem;

use hyper::body::Bytes;

use super::device_metrics::{METRICS, Metric, Value};
use super::gzip_stream::Parts;
use crate::discovery::labels::{ALERT, escape, own_info};
use crate::discovery::target_groups;
use crate::state::devices::{Cursor, DeviceList, FleetState, ListedDevice, ListedDevices};

/// The size of a part of a text, in bytes.
const TEXT_PART: usize = 16 << 10;

/// The metrics of the program, and then of each device: metric after metric, in each the devices by ascending id.
pub struct Series {
    own: String,
    devices: ListedDevices,
    /// The metric, and those that are to come.
    metrics: &'static [Metric],
    /// Whether the metric has its header.
    begun: bool,
}

impl Series {
    /// The text of the program's own metrics comes first.
    pub fn new(own: String, list: DeviceList, known: FleetState) -> Self {
        Series { own, devices: ListedDevices::new(list, known), metrics: &METRICS, begun: false }
    }
}

impl Parts for Series {
    fn append(&mut self, out: &mut Vec<u8>) -> bool {
        out.extend(mem::take(&mut self.own).into_bytes());
        let Some((metric, rest)) = self.metrics.split_first() else { return false };
        let Some(device) = self.devices.next() else {
            self.devices.rewind();
            (self.metrics, self.begun) = (rest, false);
            return true;
        };
        let start = out.len();
        if !self.begun {
            let Metric { name, about, .. } = metric;
            let _ = write!(out, "# HELP {name} {about}.\n# TYPE {name} gauge\n"); // into memory: cannot fail
        }
        if put_samples(out, metric, &device) {
            self.begun = true;
        } else {
            out.truncate(start);
        }
        true
    }
}

/// Appends the samples of a metric of a device, and returns whether there is one.
fn put_samples(out: &mut Vec<u8>, metric: &Metric, device: &ListedDevice) -> bool {
    let Some(uuid) = device.entry.uuid() else { return false };
    let name = metric.name;
    match metric.value {
        Value::Info => {
            let own = own_info(uuid, device.entry.device_name());
            put(out, [name, "{", &own, &device.entry.common.info, "} 1\n"]);
            true
        }
        Value::State(of) => put_sample(out, [name, "{uuid=\"", uuid, "\"} "], device.state.and_then(of)),
        Value::Report(of) => {
            put_sample(out, [name, "{uuid=\"", uuid, "\"} "], device.report.map(of).filter(|value| !value.is_nan()))
        }
        Value::Word(label, of) => device.state.and_then(of).is_some_and(|word| {
            put(out, [name, "{uuid=\"", uuid, "\",", label, "=\"", &escape(word), "\"} 1\n"]);
            true
        }),
        Value::Count(of) => {
            let count = device.services.as_ref().and_then(of);
            #[allow(clippy::cast_precision_loss)] // a few services
            put_sample(out, [name, "{uuid=\"", uuid, "\"} "], count.map(|count| count as f64))
        }
        Value::Status | Value::Download => put_services(out, metric, uuid, device),
    }
}

/// One sample for each service: of a download with how far it is, else with the status. One that a device has twice would make
/// all of `/metrics` invalid: the first counts.
fn put_services(out: &mut Vec<u8>, metric: &Metric, uuid: &str, device: &ListedDevice) -> bool {
    let Some(services) = &device.services else { return false };
    let installs: Vec<_> = match metric.value {
        Value::Download => services.downloads().map(|(install, ratio)| (install, Some(ratio))).collect(),
        _ => services.of_running_release().map(|install| (install, None)).collect(),
    };
    let mut put_already: Vec<&str> = Vec::new();
    for (install, ratio) in installs {
        let Some(service) = install.service.as_deref().filter(|name| !put_already.contains(name)) else { continue };
        put_already.push(service);
        put(out, [metric.name, "{uuid=\"", uuid, "\",service=\"", &escape(service), "\""]);
        if ratio.is_none() {
            put(out, [",status=\"", &escape(&install.status), "\""]);
            put(out, if services.is_muted(service) { [",", ALERT, "=\"false\""] } else { [""; 3] });
        }
        put_sample(out, ["} "], Some(ratio.unwrap_or(1.0)));
    }
    !put_already.is_empty()
}

/// Appends a sample, and returns whether there is one.
fn put_sample<N: Copy + Display + Into<f64>, const P: usize>(
    out: &mut Vec<u8>, name: [&str; P], value: Option<N>,
) -> bool {
    let Some(value) = value else { return false };
    put(out, name);
    put_number(out, value);
    out.push(b'\n');
    true
}

/// Appends a value. Most are whole numbers, which are written several times as fast. An f32 has only as many digits as tell it
/// from its neighbours.
fn put_number<N: Copy + Display + Into<f64>>(out: &mut Vec<u8>, value: N) {
    let number = value.into();
    #[allow(clippy::cast_possible_truncation)] // it is whole, and small enough
    let _ = if number.fract() == 0.0 && number.abs() < 1e18 {
        write!(out, "{}", number as i64)
    } else {
        write!(out, "{value}")
    }; // into memory: cannot fail
}

/// Appends text, at less cost than `write!`.
fn put<const N: usize>(out: &mut Vec<u8>, parts: [&str; N]) {
    for part in parts {
        out.extend_from_slice(part.as_bytes());
    }
}

/// The list as JSON, as the target file has it.
pub struct Targets {
    list: DeviceList,
    at: Cursor,
    /// Whether no target group has been made so far.
    is_first: bool,
}

impl Targets {
    /// This list.
    pub fn new(list: DeviceList) -> Self {
        Targets { list, at: Cursor::default(), is_first: true }
    }
}

impl Parts for Targets {
    fn append(&mut self, out: &mut Vec<u8>) -> bool {
        let Some(entry) = self.at.next(&self.list) else {
            out.extend_from_slice(target_groups::end(self.is_first));
            return false;
        };
        target_groups::append(entry, &mut self.is_first, out);
        true
    }
}

/// A list that an earlier run has left.
pub struct WholeText(pub Bytes);

impl Parts for WholeText {
    fn append(&mut self, out: &mut Vec<u8>) -> bool {
        out.extend_from_slice(&self.0.split_to(self.0.len().min(TEXT_PART)));
        !self.0.is_empty()
    }
}
