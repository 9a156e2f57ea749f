//! How the devices are: what balenaCloud sees and what their supervisors report, apart from discovery.
//!
//! These values change all the time, so they have a request, an interval and a thread of their own, and nothing that
//! goes wrong here is felt by discovery. The request names devices by their ids only: discovery knows the rest.

use std::fmt::Write;
use std::sync::Arc;
use std::thread;
use std::time::UNIX_EPOCH;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::balena::client::Balena;
use crate::balena::device::{One, Text, one};
use crate::balena::failure::Failure;
use crate::discovery::backoff;
use crate::discovery::inventory::Answer;
use crate::status::{Settings, Status};

const STATE: &str = "$select=id,is_online,api_heartbeat_state,last_connectivity_event";
const REPORTED: &str = ",memory_usage,memory_total,storage_usage,storage_total,cpu_usage,cpu_temp,is_undervolted";
const RELEASES: &str = "&$expand=is_running__release($select=id),should_be_running__release($select=id)";
/// Devices asked for at once.
const TOP: usize = 1000;
/// The API reports memory and storage in these.
const MIB: f64 = 1_048_576.0;

/// What is told of a device; each may be null.
#[derive(Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
#[allow(non_snake_case)] // as the API names them
struct Row<'a> {
    id: u64,
    is_online: Option<bool>,
    api_heartbeat_state: Option<Text<'a>>,
    last_connectivity_event: Option<Text<'a>>,
    is_running__release: One<Release>,
    should_be_running__release: One<Release>,
    memory_usage: Option<f64>,
    memory_total: Option<f64>,
    storage_usage: Option<f64>,
    storage_total: Option<f64>,
    cpu_usage: Option<f64>,
    cpu_temp: Option<f64>,
    is_undervolted: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Release {
    id: u64,
}

/// A metric of a device.
pub struct Metric {
    /// Its name; base units.
    pub name: &'static str,
    /// What it tells.
    pub about: &'static str,
    value: fn(&Row) -> Option<f64>,
}

#[rustfmt::skip] // a table
/// The metrics of each device that are a number; those from the fifth on only with `--device-metrics`.
pub const METRICS: [Metric; 10] = [
    Metric { name: "balena_device_online", about: "Whether the device is connected to balena's VPN", value: |row| flag(row.is_online) },
    Metric { name: "balena_device_last_connectivity_event_timestamp_seconds", about: "When the device last came online or went offline", value: |row| seconds(row.last_connectivity_event.as_deref()?) },
    Metric { name: "balena_device_update_pending", about: "Whether the device runs another release than it should", value: update_pending },
    Metric { name: "balena_device_memory_used_bytes", about: "Memory in use, as the supervisor reports it", value: |row| Some(row.memory_usage? * MIB) },
    Metric { name: "balena_device_memory_size_bytes", about: "Memory of the device", value: |row| Some(row.memory_total? * MIB) },
    Metric { name: "balena_device_storage_used_bytes", about: "Space in use on the data partition", value: |row| Some(row.storage_usage? * MIB) },
    Metric { name: "balena_device_storage_size_bytes", about: "Space of the data partition", value: |row| Some(row.storage_total? * MIB) },
    Metric { name: "balena_device_cpu_usage_ratio", about: "CPU in use, 0 to 1", value: |row| Some(row.cpu_usage? / 100.0) },
    Metric { name: "balena_device_cpu_temperature_celsius", about: "Temperature of the CPU", value: |row| row.cpu_temp },
    Metric { name: "balena_device_undervolted", about: "Whether the supervisor saw under-voltage", value: |row| flag(row.is_undervolted) },
];

/// The metric whose value is its label `state`.
pub const HEARTBEAT: (&str, &str) =
    ("balena_device_heartbeat_state", "1 for the current state of the heartbeat: online, offline, timeout or unknown");

/// What is known of a device.
pub struct Vital {
    /// Its id.
    pub id: u64,
    /// The state of its heartbeat.
    pub heartbeat: Option<String>,
    /// Its values in the order of [`METRICS`].
    pub values: Vec<Option<f64>>,
}

/// Asks for the vitals of all devices, for ever, on a thread of its own, and hands them to the status.
pub fn watch(mut balena: Balena, settings: &Settings, status: Arc<Status>) {
    let what = [STATE, if settings.device_metrics { REPORTED } else { "" }, RELEASES].concat();
    let interval = settings.device_refresh;
    thread::spawn(move || {
        let (mut pages, mut failures) = (Vec::new(), 0);
        loop {
            let ask = |after, etag: Option<&str>| {
                let answer = balena.ask(&what, after, TOP, etag);
                status.pulse().count(&answer);
                answer
            };
            let wait = match refresh(&mut pages, ask) {
                Ok(()) => {
                    if failures > 0 {
                        log::info!("the state of the devices is known again");
                    }
                    failures = 0;
                    status.set_vitals(pages.clone());
                    interval
                }
                Err(failure) => {
                    let wait = failure.retry_after.unwrap_or_else(|| backoff(failures, interval));
                    let level = if failures == 0 { log::Level::Warn } else { log::Level::Debug };
                    log::log!(level, "the state of the devices is not renewed: {}", failure.message);
                    failures += 1;
                    wait
                }
            };
            thread::sleep(wait);
        }
    });
}

/// The vitals of the devices with ids above `after`.
pub struct Page {
    after: u64,
    end: Option<u64>,
    etag: Option<String>,
    /// By rising id.
    pub vitals: Vec<Vital>,
}

fn refresh(
    pages: &mut Vec<Arc<Page>>, mut ask: impl FnMut(u64, Option<&str>) -> Result<Answer, Failure>,
) -> Result<(), Failure> {
    let mut after = 0;
    for index in 0.. {
        let old = pages.get(index).filter(|old| old.after == after);
        match ask(after, old.and_then(|old| old.etag.as_deref()))? {
            Answer::Unchanged => {}
            Answer::TooLarge(_) => return Err(Failure::new("bad_answer", "the API's answer is too large")),
            Answer::Devices(etag, body) => {
                pages.truncate(index);
                pages.push(Arc::new(read(after, etag, &body)?));
            }
        }
        match pages[index].end {
            Some(end) if end > after => after = end,
            _ => {
                pages.truncate(index + 1);
                break;
            }
        }
    }
    Ok(())
}

/// A device that cannot be read is passed over: discovery tells of it.
fn read(after: u64, etag: Option<String>, body: &[u8]) -> Result<Page, Failure> {
    #[derive(Deserialize)]
    struct Rows<'a> {
        #[serde(borrow)]
        d: Vec<&'a RawValue>,
    }
    let rows: Rows = serde_json::from_slice(body)
        .map_err(|error| Failure::new("bad_answer", format!("the API's answer is no page of devices: {error}")))?;
    let full = rows.d.len() >= TOP;
    let read = |raw: &RawValue| {
        let row: Row = serde_json::from_str(raw.get()).ok()?;
        let values = METRICS.iter().map(|metric| (metric.value)(&row)).collect();
        Some(Vital { id: row.id, heartbeat: row.api_heartbeat_state.as_deref().map(str::to_owned), values })
    };
    let vitals: Vec<Vital> = rows.d.into_iter().filter_map(read).collect();
    let end = vitals.last().map(|last| last.id).filter(|_| full);
    Ok(Page { after, end, etag, vitals })
}

fn flag(flag: Option<bool>) -> Option<f64> {
    flag.map(|flag| f64::from(u8::from(flag)))
}

fn seconds(time: &str) -> Option<f64> {
    Some(humantime::parse_rfc3339(time).ok()?.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
}

/// Without a release that it should run there is nothing to wait for.
fn update_pending(row: &Row) -> Option<f64> {
    let target = one(&row.should_be_running__release)?;
    flag(Some(one(&row.is_running__release).is_none_or(|running| running.id != target.id)))
}

/// Writes the families of the devices that `uuid` knows, in the text format 0.0.4.
pub fn write<'u>(out: &mut String, pages: &[Arc<Page>], uuid: impl Fn(u64) -> Option<&'u str>) {
    let known = || pages.iter().flat_map(|page| &page.vitals).filter_map(|vital| Some((uuid(vital.id)?, vital)));
    for (index, Metric { name, about, .. }) in METRICS.iter().enumerate() {
        let mut samples = known().filter_map(|(uuid, vital)| Some((uuid, vital.values[index]?))).peekable();
        if samples.peek().is_some() {
            let _ = write!(out, "# HELP {name} {about}.\n# TYPE {name} gauge\n");
        }
        for (uuid, value) in samples {
            let _ = writeln!(out, "{name}{{uuid=\"{uuid}\"}} {value}");
        }
    }
    let (name, about) = HEARTBEAT;
    let _ = write!(out, "# HELP {name} {about}.\n# TYPE {name} gauge\n");
    for (uuid, state) in known().filter_map(|(uuid, vital)| Some((uuid, vital.heartbeat.as_deref()?))) {
        let _ = writeln!(out, "{name}{{uuid=\"{uuid}\",state=\"{}\"}} 1", escape(state));
    }
}

/// A label value in the text format 0.0.4.
pub fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
