//! What balenaCloud sees of a device, and what the device's supervisor reports of it.

use std::cmp::Ordering;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::Error;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::record_lists::{RecordKind, Shared};
use crate::balena::Text;
use crate::balena::device::{self, Release, one};

/// What the supervisors report.
pub const REPORTS: &str =
    "$select=id,memory_usage,memory_total,storage_usage,storage_total,cpu_usage,cpu_temp,is_undervolted";

/// What balenaCloud sees of a device. What it does not know is none.
pub struct DeviceState {
    /// Whether the device is connected to balena's VPN.
    pub online: Option<bool>,
    /// When it last connected to the VPN or lost the connection.
    pub since: Option<Moment>,
    /// The state of its heartbeat: `online`, `offline`, `timeout` or `unknown`.
    pub heartbeat: Option<Arc<str>>,
    /// Id of the release that it runs.
    pub running: Option<NonZeroU64>,
    /// Id of the release that it should run.
    pub target: Option<NonZeroU64>,
    /// The version of that release, such as `1.2.3`.
    pub target_version: Option<Arc<str>>,
    /// What became of its last update: `rejected`, `aborted`, `downloading`, `downloaded`, `applying changes` or `done`. None
    /// where the supervisor is older than 16.10.0.
    pub update: Option<Arc<str>>,
    pub update_since: Option<Moment>,
    /// Whether it should run a newer balenaOS. None on servers without releases of the OS.
    pub os_pending: Option<bool>,
    /// Whether it should run a newer supervisor.
    pub supervisor_pending: Option<bool>,
    pub provisioned: Option<Moment>,
}

/// What the supervisor of a device reports. The API has whole MiB, percent and degrees, for which these are precise enough; NaN
/// stands for null.
#[derive(Deserialize)]
pub struct SupervisorReport {
    /// MiB.
    #[serde(rename = "memory_usage", default = "nan", deserialize_with = "number")]
    pub memory_used: f32,
    /// MiB.
    #[serde(rename = "memory_total", default = "nan", deserialize_with = "number")]
    pub memory_size: f32,
    /// MiB of the data partition.
    #[serde(rename = "storage_usage", default = "nan", deserialize_with = "number")]
    pub storage_used: f32,
    /// MiB of the data partition.
    #[serde(rename = "storage_total", default = "nan", deserialize_with = "number")]
    pub storage_size: f32,
    /// Percent, in steps of about 20.
    #[serde(default = "nan", deserialize_with = "number")]
    pub cpu_usage: f32,
    /// °C, in steps of about 3.
    #[serde(rename = "cpu_temp", default = "nan", deserialize_with = "number")]
    pub cpu_temperature: f32,
    pub is_undervolted: Option<bool>,
}

/// A moment, in milliseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment(NonZeroU64);

impl Moment {
    /// Seconds since 1970.
    #[allow(clippy::cast_precision_loss)] // no date needs more than 53 bits
    pub fn seconds(self) -> f64 {
        self.0.get() as f64 / 1000.0
    }

    /// As the system's clock has it.
    pub fn time(self) -> Option<SystemTime> {
        UNIX_EPOCH.checked_add(Duration::from_millis(self.0.get()))
    }

    fn parse(text: &str) -> Option<Self> {
        let since = humantime::parse_rfc3339(text).ok()?.duration_since(UNIX_EPOCH).ok()?;
        NonZeroU64::new(u64::try_from(since.as_millis()).ok()?).map(Moment)
    }
}

/// Each field may be null, and is missing where it was not asked for.
#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
#[allow(non_snake_case)] // as the API names them
struct StateRecord<'a> {
    id: u64,
    is_connected_to_vpn: Option<bool>,
    last_vpn_event: Option<Text<'a>>,
    api_heartbeat_state: Option<Text<'a>>,
    update_status: Option<Text<'a>>,
    last_update_status_event: Option<Text<'a>>,
    created_at: Option<Text<'a>>,
    os_version: Option<Text<'a>>,
    supervisor_version: Option<Text<'a>>,
    #[serde(default, deserialize_with = "one")]
    is_running__release: Option<Release<'a>>,
    #[serde(default, deserialize_with = "one")]
    should_be_running__release: Option<Release<'a>>,
    #[serde(default, deserialize_with = "one")]
    should_be_operated_by__release: Option<Release<'a>>,
    #[serde(default, deserialize_with = "one")]
    should_be_managed_by__release: Option<Release<'a>>,
}

impl RecordKind for DeviceState {
    fn read(raw: &RawValue, shared: &mut Shared) -> serde_json::Result<(u64, Self)> {
        let record: StateRecord = serde_json::from_str(raw.get())?;
        let mut moment = |name: &str, text: Option<Text>| {
            let moment = Moment::parse(text.as_deref()?);
            if moment.is_none() {
                shared.problem = Some(format!("{name} is no date"));
            }
            moment
        };
        let since = moment("last_vpn_event", record.last_vpn_event);
        let update_since = moment("last_update_status_event", record.last_update_status_event);
        let provisioned = moment("created_at", record.created_at);
        let target = record.should_be_running__release;
        let state = DeviceState {
            online: record.is_connected_to_vpn,
            since,
            heartbeat: record.api_heartbeat_state.map(|state| shared.word(&state)),
            running: record.is_running__release.and_then(|release| release.id),
            target: target.as_ref().and_then(|release| release.id),
            target_version: target.and_then(|release| release.raw_version).map(|version| shared.word(&version)),
            update: record.update_status.map(|status| shared.word(&status)),
            update_since,
            os_pending: is_newer(record.should_be_operated_by__release, record.os_version),
            supervisor_pending: is_newer(record.should_be_managed_by__release, record.supervisor_version),
            provisioned,
        };
        Ok((record.id, state))
    }
}

impl DeviceState {
    /// Whether the device runs another release than it should. Without a release that it should run, there is nothing to wait
    /// for.
    pub fn update_pending(&self) -> Option<bool> {
        self.target.map(|target| self.running != Some(target))
    }

    pub fn update_failed(&self) -> Option<bool> {
        self.update.as_deref().map(|status| matches!(status, "rejected" | "aborted"))
    }
}

impl RecordKind for SupervisorReport {
    fn read(raw: &RawValue, _: &mut Shared) -> serde_json::Result<(u64, Self)> {
        let id = device::id(raw).ok_or_else(|| serde_json::Error::missing_field("id"))?;
        Ok((id, serde_json::from_str(raw.get())?))
    }
}

fn nan() -> f32 {
    f32::NAN
}

/// NaN stands for null, and a value that is out of range becomes infinite.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f32, D::Error> {
    #[allow(clippy::cast_possible_truncation)]
    Ok(Option::<f64>::deserialize(deserializer)?.map_or(f32::NAN, |value| value as f32))
}

/// Whether the version that should run is newer than the one that runs, as in `6.10.30` and `balenaOS 6.1.24`: an update of the
/// OS can bring a newer supervisor than the device was assigned.
fn is_newer(should: Option<Release>, runs: Option<Text>) -> Option<bool> {
    let (should, runs) = (should?.raw_version?, runs?);
    let runs = runs.split_whitespace().next_back()?;
    let numbers = |version: &str| -> Vec<u64> {
        version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
    };
    Some(numbers(&should).cmp(&numbers(runs)) == Ordering::Greater)
}
