//! The state of the devices: what balenaCloud sees and what their supervisors report.
//!
//! These values change all the time, so they have their own request, interval and thread. A failure here does not affect discovery. The
//! request names devices by their ids only: discovery knows the rest.

use std::io::Write;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use log::Level;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::backoff::Backoff;
use crate::balena::device::{self, Text, one};
use crate::balena::pages::{Pages, Place, Read, Reader};
use crate::balena::{Answer, Client, Failure, Reason};
use crate::net::threads;

const STATE: &str = "$select=id,is_online,api_heartbeat_state,last_connectivity_event";
const REPORTED: &str = ",memory_usage,memory_total,storage_usage,storage_total,cpu_usage,cpu_temp,is_undervolted";
const RELEASES: &str = "&$expand=is_running__release($select=id),should_be_running__release($select=id)";
/// The API reports memory and storage in MiB.
const MIB: f64 = 1_048_576.0;

/// The record of a device; each field may be null.
#[derive(Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
#[allow(non_snake_case)] // as the API names them
struct Record<'a> {
    id: u64,
    is_online: Option<bool>,
    api_heartbeat_state: Option<Text<'a>>,
    last_connectivity_event: Option<Text<'a>>,
    #[serde(default, deserialize_with = "one")]
    is_running__release: Option<Release>,
    #[serde(default, deserialize_with = "one")]
    should_be_running__release: Option<Release>,
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
    /// What it says.
    pub about: &'static str,
    value: fn(&Record) -> Option<f64>,
}

#[rustfmt::skip] // a table
/// The metrics of each device that are a number. Those from the fourth on need `--device-metrics`.
pub const METRICS: [Metric; 10] = [
    Metric { name: "balena_device_online", about: "Whether the device is connected to balena's VPN", value: |it| flag(it.is_online) },
    Metric { name: "balena_device_last_connectivity_event_timestamp_seconds", about: "When the device last came online or went offline", value: |it| seconds(it.last_connectivity_event.as_deref()?) },
    Metric { name: "balena_device_update_pending", about: "Whether the device runs another release than it should", value: update_pending },
    Metric { name: "balena_device_memory_used_bytes", about: "Memory in use, as the supervisor reports it", value: |it| Some(it.memory_usage? * MIB) },
    Metric { name: "balena_device_memory_size_bytes", about: "Memory of the device", value: |it| Some(it.memory_total? * MIB) },
    Metric { name: "balena_device_storage_used_bytes", about: "Space in use on the data partition", value: |it| Some(it.storage_usage? * MIB) },
    Metric { name: "balena_device_storage_size_bytes", about: "Space of the data partition", value: |it| Some(it.storage_total? * MIB) },
    Metric { name: "balena_device_cpu_usage_ratio", about: "CPU in use, 0 to 1", value: |it| Some(it.cpu_usage? / 100.0) },
    Metric { name: "balena_device_cpu_temperature_celsius", about: "Temperature of the CPU", value: |it| it.cpu_temp },
    Metric { name: "balena_device_undervolted", about: "Whether the supervisor saw under-voltage", value: |it| flag(it.is_undervolted) },
];

/// Places in [`METRICS`].
const ONLINE: usize = 0;
const SINCE: usize = 1;
const UPDATE_PENDING: usize = 2;

/// The metric whose value is its label `state`.
pub const HEARTBEAT: (&str, &str) =
    ("balena_device_heartbeat_state", "1 for the current state of the heartbeat: online, offline, timeout or unknown");

/// The state of the devices of a page.
#[derive(Default)]
pub struct States {
    /// By ascending id.
    devices: Vec<State>,
    /// The heartbeat states that occur.
    heartbeats: Vec<Box<str>>,
}

/// The state of a device.
struct State {
    id: u64,
    /// Index of the state of its heartbeat.
    heartbeat: Option<u8>,
    /// When it last came online or went offline, in seconds since 1970; NaN if that is unknown.
    since: f64,
    /// In the order of [`METRICS`]; NaN where there is none. Half the size of the numbers that the API sends, which are whole
    /// MiB, percent and degrees. The time would lose its seconds and is kept apart.
    values: [f32; METRICS.len()],
}

impl State {
    /// The value of a metric, but not of the time.
    fn number(&self, metric: usize) -> Option<f32> {
        self.values.get(metric).copied().filter(|value| !value.is_nan())
    }
}

/// Asks for the state of all devices, for ever, on a new thread. `publish` gets the pages after each success.
///
/// # Errors
/// The thread cannot be started. The text is for the user.
pub fn watch(
    client: Client, interval: Duration, reported: bool, publish: impl Fn(Vec<Arc<States>>) + Send + 'static,
) -> Result<(), String> {
    let what = [STATE, if reported { REPORTED } else { "" }, RELEASES].concat();
    let run = move || {
        let mut reader = StateReader { client, what };
        let mut pages = Pages::default();
        let mut backoff = Backoff::new(interval);
        loop {
            let wait = match pages.refresh(&mut reader, || ()) {
                Ok(()) => {
                    if backoff.failures() > 0 {
                        log::info!("the state of the devices is known again");
                    }
                    backoff.succeeded();
                    publish(pages.contents().cloned().collect());
                    interval
                }
                Err(failure) => {
                    let level = if backoff.failures() == 0 { Level::Warn } else { Level::Debug };
                    log::log!(level, "cannot renew the state of the devices: {failure}");
                    backoff.failed(failure.retry_after)
                }
            };
            thread::sleep(wait);
        }
    };
    threads::spawn("device-metrics", run).map_err(|error| error.to_string())
}

struct StateReader {
    client: Client,
    what: String,
}

impl Reader<Arc<States>> for StateReader {
    fn ask(&mut self, after: u64, limit: usize, etag: Option<&str>) -> Result<Answer, Failure> {
        self.client.ask(&self.what, after, limit, etag)
    }

    /// A device that cannot be read is skipped: discovery reports it.
    fn read(&mut self, body: &[u8], place: Place<'_, Arc<States>>) -> Result<Read<Arc<States>>, Failure> {
        let records = device::records(body).map_err(|error| self.invalid(&device::describe(&error)))?;
        let is_full = records.len() >= place.limit;
        let mut states = States::default();
        for raw in records {
            states.add(raw);
        }
        let end = states.devices.last().map(|last| last.id).filter(|_| is_full);
        let size = states.devices.len() * size_of::<State>();
        Ok(Read { content: states.into(), end, size })
    }

    fn too_large(&mut self, after: u64) -> Result<Read<Arc<States>>, Failure> {
        Err(self.invalid(&format!("the device after id {after} is too large")))
    }

    fn invalid(&self, why: &str) -> Failure {
        let message = format!("the answer of {} is no page of devices: {why}", self.client.url());
        Failure::new(Reason::BadAnswer, message)
    }
}

impl States {
    fn add(&mut self, raw: &RawValue) {
        let Ok(record) = serde_json::from_str::<Record>(raw.get()) else { return };
        let values = METRICS.each_ref().map(|metric| (metric.value)(&record).unwrap_or(f64::NAN));
        let since = values[SINCE];
        #[allow(clippy::cast_possible_truncation)] // a value that is out of range becomes infinite
        let values = values.map(|value| value as f32);
        let heartbeat = record.api_heartbeat_state.as_deref().and_then(|state| self.heartbeat(state));
        self.devices.push(State { id: record.id, heartbeat, since, values });
    }

    fn heartbeat(&mut self, state: &str) -> Option<u8> {
        let known = self.heartbeats.iter().position(|known| **known == *state);
        let index = known.unwrap_or_else(|| {
            self.heartbeats.push(state.into());
            self.heartbeats.len() - 1
        });
        u8::try_from(index).ok()
    }
}

fn flag(flag: Option<bool>) -> Option<f64> {
    flag.map(|flag| f64::from(u8::from(flag)))
}

fn seconds(time: &str) -> Option<f64> {
    Some(humantime::parse_rfc3339(time).ok()?.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
}

/// Without a release that it should run there is nothing to wait for.
fn update_pending(record: &Record) -> Option<f64> {
    let target = record.should_be_running__release.as_ref()?;
    flag(Some(record.is_running__release.as_ref().is_none_or(|running| running.id != target.id)))
}

/// The state of the device with this id. `at` is the page and the device to go on from: ids are asked for in ascending order.
pub fn find<'a>(pages: &'a [Arc<States>], at: &mut (usize, usize), id: u64) -> Option<Known<'a>> {
    loop {
        let page = pages.get(at.0)?;
        match page.devices.get(at.1) {
            None => *at = (at.0 + 1, 0),
            Some(state) if state.id < id => at.1 += 1,
            Some(state) => return (state.id == id).then_some(Known { page, state }),
        }
    }
}

/// The state of a device that is known.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    page: &'a States,
    state: &'a State,
}

impl<'a> Known<'a> {
    /// Whether it is connected to the VPN.
    pub fn online(self) -> Option<bool> {
        self.state.number(ONLINE).map(|value| value > 0.0)
    }

    /// When it last came online or went offline, in seconds since 1970.
    pub fn since(self) -> Option<f64> {
        Some(self.state.since).filter(|since| !since.is_nan())
    }

    /// Whether it runs another release than it should.
    pub fn update_pending(self) -> bool {
        self.state.number(UPDATE_PENDING).is_some_and(|value| value > 0.0)
    }

    /// The state of its heartbeat.
    pub fn heartbeat(self) -> Option<&'a str> {
        self.page.heartbeats.get(usize::from(self.state.heartbeat?)).map(|state| &**state)
    }

    /// Appends the value of a metric, by its place in [`METRICS`]. False if there is none.
    pub fn append(self, metric: usize, out: &mut Vec<u8>) -> bool {
        // into memory: cannot fail
        match (metric, self.state.number(metric)) {
            (SINCE, _) => self.since().is_some_and(|since| write!(out, "{since}").is_ok()),
            // Most values are whole numbers, which are written several times as fast. An f32 would show as few digits as tell
            // it from its neighbours, which are not all of a large one's.
            #[allow(clippy::cast_possible_truncation)] // it is whole, and small enough
            (_, Some(value)) if value.fract() == 0.0 && value.abs() < 1e18 => write!(out, "{}", value as i64).is_ok(),
            (_, Some(value)) => write!(out, "{value}").is_ok(),
            (_, None) => false,
        }
    }
}
