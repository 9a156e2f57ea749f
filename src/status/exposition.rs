//! `/metrics` and `/targets`, made from what is kept, part by part.

use std::io::Write;

use hyper::body::Bytes;

use super::device_metrics::{METRICS, Metric, Value};
use super::gzip_stream::Parts;
use crate::device_state::listed_devices::{Cursor, DeviceList, FleetState, ListedDevice, ListedDevices};
use crate::discovery::labels::{ALERT, escape, own_info};
use crate::discovery::target_groups;

/// The size of a part of a text, in bytes.
const TEXT_PART: usize = 16 << 10;

/// The text of the program's own metrics, and then those of each device: metric after metric, in each the devices by ascending
/// id.
pub fn metrics(own: String, list: DeviceList, known: FleetState) -> Parts {
    let mut own = own.into_bytes();
    let mut devices = ListedDevices::new(list, known);
    let mut metrics = METRICS.as_slice();
    let mut has_header = false;
    Box::new(move |out| {
        out.append(&mut own);
        let Some((metric, rest)) = metrics.split_first() else { return false };
        let Some(device) = devices.next() else {
            devices.rewind();
            (metrics, has_header) = (rest, false);
            return true;
        };
        let start = out.len();
        if !has_header {
            let Metric { name, about, .. } = metric;
            let _ = write!(out, "# HELP {name} {about}.\n# TYPE {name} gauge\n"); // into memory: cannot fail
        }
        if put_samples(out, metric, &device) {
            has_header = true;
        } else {
            out.truncate(start);
        }
        true
    })
}

/// Appends the samples of a metric of a device, and returns whether there is one.
fn put_samples(out: &mut Vec<u8>, metric: &Metric, device: &ListedDevice) -> bool {
    let Some(uuid) = device.entry.uuid() else { return false };
    let name = metric.name;
    match metric.value {
        Value::Info => {
            let own = own_info(uuid, device.entry.device_name());
            put(out, [name, "{", &own, &device.entry.common.info, "} 1\n"]);
        }
        Value::Number(of) => {
            let Some(number) = of(device) else { return false };
            put(out, [name, "{uuid=\"", uuid, "\"} "]);
            put_number(out, number);
        }
        Value::Word(label, of) => {
            let Some(word) = of(device) else { return false };
            put(out, [name, "{uuid=\"", uuid, "\",", label, "=\"", &escape(word), "\"} 1\n"]);
        }
        Value::Status | Value::Download => return put_services(out, metric, uuid, device),
    }
    true
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
        put(out, ["} "]);
        put_number(out, ratio.unwrap_or(1.0));
    }
    !put_already.is_empty()
}

/// Appends a value and the end of the line. Most are whole numbers, which are written several times as fast.
fn put_number(out: &mut Vec<u8>, number: f64) {
    #[allow(clippy::cast_possible_truncation)] // it is whole, and small enough
    let _ = if number.fract() == 0.0 && number.abs() < 1e18 {
        writeln!(out, "{}", number as i64)
    } else {
        writeln!(out, "{number}")
    }; // into memory: cannot fail
}

/// Appends text, at less cost than `write!`.
fn put<const N: usize>(out: &mut Vec<u8>, parts: [&str; N]) {
    for part in parts {
        out.extend_from_slice(part.as_bytes());
    }
}

/// The list as JSON, as the target file has it.
pub fn targets(list: DeviceList) -> Parts {
    let (mut at, mut is_first) = (Cursor::default(), true);
    Box::new(move |out| {
        let entry = at.next(&list);
        match entry {
            Some(entry) => target_groups::append(entry, &mut is_first, out),
            None => out.extend_from_slice(target_groups::end(is_first)),
        }
        entry.is_some()
    })
}

pub fn text(mut text: Bytes) -> Parts {
    Box::new(move |out| {
        out.extend_from_slice(&text.split_to(text.len().min(TEXT_PART)));
        !text.is_empty()
    })
}
