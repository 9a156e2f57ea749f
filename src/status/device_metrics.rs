//! The metrics of the devices: their state, which balenaCloud sees, and what their supervisors report.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use serde::Deserialize;

use crate::balena::device::{Text, one};

/// The API reports memory and storage in MiB.
const MIB: f32 = 1_048_576.0;

/// The record of a device; each field may be null, and is missing where it was not asked for.
#[derive(Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
#[allow(non_snake_case)] // as the API names them
pub struct Record<'a> {
    /// Its id.
    pub id: u64,
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
    /// Its value.
    pub value: Value,
}

/// What the value of a metric is made from.
#[derive(Clone, Copy)]
pub enum Value {
    /// The state of the device.
    State(fn(&State) -> Option<f64>),
    /// The report of its supervisor. NaN if it does not have the value.
    Report(fn(&Report) -> f32),
}

#[rustfmt::skip] // a table
/// The metrics of each device that are a number. Those of reports need `--device-metrics`.
pub const METRICS: [Metric; 10] = [
    Metric { name: "balena_device_online", about: "Whether the device is connected to balena's VPN", value: Value::State(|it| flag(it.online)) },
    Metric { name: "balena_device_last_connectivity_event_timestamp_seconds", about: "When the device last came online or went offline", value: Value::State(|it| it.since) },
    Metric { name: "balena_device_update_pending", about: "Whether the device runs another release than it should", value: Value::State(|it| flag(it.update_pending)) },
    Metric { name: "balena_device_memory_used_bytes", about: "Memory in use, as the supervisor reports it", value: Value::Report(|it| it.memory_used * MIB) },
    Metric { name: "balena_device_memory_size_bytes", about: "Memory of the device", value: Value::Report(|it| it.memory_size * MIB) },
    Metric { name: "balena_device_storage_used_bytes", about: "Space in use on the data partition", value: Value::Report(|it| it.storage_used * MIB) },
    Metric { name: "balena_device_storage_size_bytes", about: "Space of the data partition", value: Value::Report(|it| it.storage_size * MIB) },
    Metric { name: "balena_device_cpu_usage_ratio", about: "CPU in use, 0 to 1", value: Value::Report(|it| it.cpu_usage / 100.0) },
    Metric { name: "balena_device_cpu_temperature_celsius", about: "Temperature of the CPU", value: Value::Report(|it| it.cpu_temperature) },
    Metric { name: "balena_device_undervolted", about: "Whether the supervisor saw under-voltage", value: Value::Report(|it| it.undervolted) },
];

/// The metric whose value is its label `state`.
pub const HEARTBEAT: (&str, &str) =
    ("balena_device_heartbeat_state", "1 for the current state of the heartbeat: online, offline, timeout or unknown");

/// The states of heartbeats that occur in a page.
type Heartbeats = Vec<Box<str>>;

/// What is kept of a page of devices.
pub struct Devices<V> {
    /// By ascending id.
    pub devices: Vec<(u64, V)>,
    heartbeats: Heartbeats,
}

/// What is kept of a device.
pub trait Kept: Send + Sync + 'static {
    /// What to ask for. The devices are named by their ids only: discovery knows the rest.
    const QUERY: &str;

    /// Takes it from the API's record.
    fn of(record: &Record, heartbeats: &mut Heartbeats) -> Self;
}

/// The state of a device, which balenaCloud sees.
pub struct State {
    online: Option<bool>,
    update_pending: Option<bool>,
    /// Index of the state of its heartbeat.
    heartbeat: Option<u8>,
    /// When it last came online or went offline, in seconds since 1970.
    since: Option<f64>,
}

/// What the supervisor of a device reports. The API has whole MiB, percent and degrees, for which these are precise enough; NaN
/// stands for null.
pub struct Report {
    memory_used: f32,
    memory_size: f32,
    storage_used: f32,
    storage_size: f32,
    cpu_usage: f32,
    cpu_temperature: f32,
    undervolted: f32,
}

impl<V> Default for Devices<V> {
    fn default() -> Self {
        Devices { devices: Vec::new(), heartbeats: Vec::new() }
    }
}

impl<V: Kept> Devices<V> {
    /// Adds a device with a higher id.
    pub fn add(&mut self, record: &Record) {
        self.devices.push((record.id, V::of(record, &mut self.heartbeats)));
    }
}

impl Kept for State {
    const QUERY: &str = "$select=id,is_online,api_heartbeat_state,last_connectivity_event\
        &$expand=is_running__release($select=id),should_be_running__release($select=id)";

    fn of(record: &Record, heartbeats: &mut Heartbeats) -> Self {
        let heartbeat = record.api_heartbeat_state.as_deref().and_then(|state| {
            let known = heartbeats.iter().position(|known| **known == *state);
            let index = known.unwrap_or_else(|| {
                heartbeats.push(state.into());
                heartbeats.len() - 1
            });
            u8::try_from(index).ok()
        });
        State {
            online: record.is_online,
            update_pending: update_pending(record),
            heartbeat,
            since: record.last_connectivity_event.as_deref().and_then(seconds),
        }
    }
}

impl Kept for Report {
    const QUERY: &str =
        "$select=id,memory_usage,memory_total,storage_usage,storage_total,cpu_usage,cpu_temp,is_undervolted";

    fn of(record: &Record, _: &mut Heartbeats) -> Self {
        #[allow(clippy::cast_possible_truncation)] // a value that is out of range becomes infinite
        let number = |value: Option<f64>| value.map_or(f32::NAN, |value| value as f32);
        Report {
            memory_used: number(record.memory_usage),
            memory_size: number(record.memory_total),
            storage_used: number(record.storage_usage),
            storage_size: number(record.storage_total),
            cpu_usage: number(record.cpu_usage),
            cpu_temperature: number(record.cpu_temp),
            undervolted: number(flag(record.is_undervolted)),
        }
    }
}

fn flag(flag: Option<bool>) -> Option<f64> {
    flag.map(|flag| f64::from(u8::from(flag)))
}

fn seconds(time: &str) -> Option<f64> {
    Some(humantime::parse_rfc3339(time).ok()?.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
}

/// Without a release that it should run there is nothing to wait for.
fn update_pending(record: &Record) -> Option<bool> {
    let target = record.should_be_running__release.as_ref()?;
    Some(record.is_running__release.as_ref().is_none_or(|running| running.id != target.id))
}

/// What is kept of the device with this id, and its page. `at` is the page and the device to go on from: ids are asked for in
/// ascending order.
pub fn find<'a, V>(pages: &'a [Arc<Devices<V>>], at: &mut (usize, usize), id: u64) -> Option<Known<'a, V>> {
    loop {
        let page = pages.get(at.0)?;
        match page.devices.get(at.1) {
            None => *at = (at.0 + 1, 0),
            Some((known, _)) if *known < id => at.1 += 1,
            Some((known, kept)) => return (*known == id).then_some(Known { page, kept }),
        }
    }
}

/// What is known of a device.
pub struct Known<'a, V = State> {
    page: &'a Devices<V>,
    kept: &'a V,
}

impl<V> Clone for Known<'_, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for Known<'_, V> {}

impl<'a> Known<'a> {
    /// Whether it is connected to the VPN.
    pub fn online(self) -> Option<bool> {
        self.kept.online
    }

    /// When it last came online or went offline, in seconds since 1970.
    pub fn since(self) -> Option<f64> {
        self.kept.since
    }

    /// The state of its heartbeat.
    pub fn heartbeat(self) -> Option<&'a str> {
        self.page.heartbeats.get(usize::from(self.kept.heartbeat?)).map(|state| &**state)
    }

    /// The value of a metric of its state.
    pub fn value(self, of: fn(&State) -> Option<f64>) -> Option<f64> {
        of(self.kept)
    }
}

impl Known<'_, Report> {
    /// The value of a metric of its report.
    pub fn value(self, of: fn(&Report) -> f32) -> Option<f32> {
        Some(of(self.kept)).filter(|value| !value.is_nan())
    }
}
