//! The metrics of the devices: what they are, their state, what runs on them, and what their supervisors report.

use super::metrics::number;
use crate::device_state::listed_devices::ListedDevice;
use crate::device_state::reported::Moment;

/// The API reports memory and storage in MiB.
const MIB: f64 = 1_048_576.0;

/// A metric of a device. All are gauges.
pub struct Metric {
    pub name: &'static str,
    pub about: &'static str,
    pub value: Value,
}

/// What the value of a metric is made from.
#[derive(Clone, Copy)]
pub enum Value {
    /// 1, with the labels of `balena_device_info`.
    Info,
    Number(fn(&ListedDevice) -> Option<f64>),
    /// 1, with a word as this label.
    Word(&'static str, for<'d> fn(&ListedDevice<'d>) -> Option<&'d str>),
    /// Each service that does not run, of the release that runs: 1, with its status.
    Status,
    /// Each service of the release that should run: how far its download is.
    Download,
}

#[rustfmt::skip] // a table
/// The metrics of each device. Those of services need `--device-services`, those of reports `--device-metrics`.
pub static METRICS: [Metric; 23] = [
    Metric { name: "balena_device_info", about: "What the device is, for joining into other series", value: Value::Info },
    Metric { name: "balena_device_online", about: "Whether the device is connected to balena's VPN", value: Value::Number(|it| flag(it.state?.online)) },
    Metric { name: "balena_device_last_connectivity_event_timestamp_seconds", about: "When the device last connected to the VPN or lost the connection", value: Value::Number(|it| it.state?.since.map(Moment::seconds)) },
    Metric { name: "balena_device_heartbeat_state", about: "1 for the current state of the heartbeat: online, offline, timeout or unknown", value: Value::Word("state", |it| it.state?.heartbeat.as_deref()) },
    Metric { name: "balena_device_provisioned_timestamp_seconds", about: "When the device was registered", value: Value::Number(|it| it.state?.provisioned.map(Moment::seconds)) },
    Metric { name: "balena_device_update_pending", about: "Whether the device runs another release than it should", value: Value::Number(|it| flag(it.state?.update_pending())) },
    Metric { name: "balena_device_update_failed", about: "Whether the last update was rejected or aborted", value: Value::Number(|it| flag(it.state?.update_failed())) },
    Metric { name: "balena_device_update_status", about: "1 for the status of an update that is not done: rejected, aborted, downloading, downloaded or applying changes", value: Value::Word("status", |it| it.state?.update.as_deref().filter(|status| *status != "done")) },
    Metric { name: "balena_device_last_update_status_event_timestamp_seconds", about: "When the status of the last update changed", value: Value::Number(|it| it.state?.update_since.map(Moment::seconds)) },
    Metric { name: "balena_device_update_release", about: "1 with the version of the release that the device should run, while it runs another one", value: Value::Word("release", |it| it.state.filter(|state| state.update_pending() == Some(true))?.target_version.as_deref()) },
    Metric { name: "balena_device_os_update_pending", about: "Whether the device should run a newer balenaOS", value: Value::Number(|it| flag(it.state?.os_pending)) },
    Metric { name: "balena_device_supervisor_update_pending", about: "Whether the device should run a newer supervisor", value: Value::Number(|it| flag(it.state?.supervisor_pending)) },
    Metric { name: "balena_device_services_running", about: "Running services of the device's current release", value: Value::Number(|it| Some(number(it.services.as_ref()?.running()))) },
    Metric { name: "balena_device_services_not_running", about: "Services of the device's current release that do not run; absent while the device reports none of its services", value: Value::Number(|it| it.services.as_ref().filter(|services| services.are_reported()).map(|services| number(services.not_running()))) },
    Metric { name: "balena_device_service_status", about: "1 for the status of a service that does not run, as the API writes it", value: Value::Status },
    Metric { name: "balena_device_service_download_ratio", about: "Progress of a service of the release that the device should run, 0 to 1", value: Value::Download },
    Metric { name: "balena_device_memory_used_bytes", about: "Memory in use, as the supervisor reports it", value: Value::Number(|it| Some(known(it.report?.memory_used)? * MIB)) },
    Metric { name: "balena_device_memory_size_bytes", about: "Memory of the device", value: Value::Number(|it| Some(known(it.report?.memory_size)? * MIB)) },
    Metric { name: "balena_device_storage_used_bytes", about: "Space in use on the data partition", value: Value::Number(|it| Some(known(it.report?.storage_used)? * MIB)) },
    Metric { name: "balena_device_storage_size_bytes", about: "Space of the data partition", value: Value::Number(|it| Some(known(it.report?.storage_size)? * MIB)) },
    Metric { name: "balena_device_cpu_usage_ratio", about: "CPU in use, 0 to 1, in steps of about 0.2", value: Value::Number(|it| Some((known(it.report?.cpu_usage)? / 100.0).clamp(0.0, 1.0))) },
    Metric { name: "balena_device_cpu_temperature_celsius", about: "Temperature of the CPU, in steps of about 3", value: Value::Number(|it| known(it.report?.cpu_temperature)) },
    Metric { name: "balena_device_undervolted", about: "Whether the supervisor saw under-voltage", value: Value::Number(|it| flag(it.report?.is_undervolted)) },
];

fn flag(flag: Option<bool>) -> Option<f64> {
    flag.map(|flag| f64::from(u8::from(flag)))
}

/// What the supervisor reports, if it does.
fn known(value: f32) -> Option<f64> {
    Some(value.into()).filter(|value: &f64| !value.is_nan())
}
