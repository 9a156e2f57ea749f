//! Every label, declared once: its name, its text for docs/metrics.md, its value, the API's field that it needs, and whether it
//! is part of `balena_device_info`.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::exporter::Exporter;
use super::label_prefix::PREFIX;
use super::tags::Tags;
use crate::balena::{Device, Text};

#[derive(Clone, Copy, Debug)]
pub struct Label {
    /// Its name on a target. A plain label that is not chosen becomes `__meta_balena_<name>`.
    pub name: &'static str,
    /// What it holds, and when it is absent.
    pub about: &'static str,
    /// The field of a device that it needs, beside what is always asked for.
    pub field: Option<&'static str>,
    /// Its name in `balena_device_info`, if it is part of that.
    pub info: Option<&'static str>,
    pub value: for<'d> fn(&'d Device<'_>) -> Option<Cow<'d, str>>,
}

impl Label {
    /// Whether it can stay on every series. Any other one is there for relabelling, and Prometheus drops it afterwards.
    pub fn is_plain(&self) -> bool {
        !self.name.starts_with(META_PREFIX)
    }
}

#[rustfmt::skip] // a table
/// The labels of a device. The tables in the documentation are checked against it.
pub const LABELS: &[Label] = &[
    Label { name: DEVICE_NAME, about: "name of the device; not unique", field: Some(DEVICE_NAME), info: Some(DEVICE_NAME), value: |d| text(&d.device_name) },
    Label { name: UUID, about: "uuid of the device; always there", field: None, info: Some(UUID), value: |d| d.uuid().map(Cow::Borrowed) },
    Label { name: "device_type", about: "type of the device, `raspberrypi4-64`", field: None, info: Some("device_type"), value: |d| text(&d.device_type.as_ref()?.slug) },
    Label { name: "fleet", about: "slug of its fleet, `organization/name`; absent without a fleet", field: None, info: Some("fleet"), value: |d| text(&d.fleet.as_ref()?.slug) },
    Label { name: "commit", about: "commit of the release that it runs; absent before the first", field: None, info: Some("commit"), value: |d| text(&d.release.as_ref()?.commit) },
    Label { name: "os_version", about: "`balenaOS 6.1.24`", field: Some("os_version"), info: Some("os_version"), value: |d| text(&d.os_version) },
    Label { name: "os_variant", about: "`prod` or `dev`; absent if unknown", field: Some("os_variant"), info: Some("os_variant"), value: |d| text(&d.os_variant) },
    Label { name: "supervisor_version", about: "version of its supervisor", field: Some("supervisor_version"), info: Some("supervisor_version"), value: |d| text(&d.supervisor_version) },
    Label { name: DEVICE_ID, about: "id of the device in balena's database", field: None, info: None, value: |d| number(d.id) },
    Label { name: "__meta_balena_fleet_name", about: "name of its fleet; not unique across organizations", field: None, info: None, value: |d| text(&d.fleet.as_ref()?.app_name) },
    Label { name: "__meta_balena_fleet_id", about: "id of its fleet", field: None, info: None, value: |d| number(d.fleet.as_ref()?.id) },
    Label { name: "__meta_balena_organization", about: "handle of the organization that owns the fleet", field: None, info: None, value: |d| text(&d.fleet.as_ref()?.organization.as_ref()?.handle) },
    Label { name: "__meta_balena_release", about: "version of the release that it runs, `1.2.3`", field: None, info: Some("release"), value: |d| text(&d.release.as_ref()?.raw_version) },
];

/// A label that comes from an exporter or from tags.
pub struct ScrapeLabel {
    pub name: &'static str,
    /// What it holds, and when it is absent.
    pub about: &'static str,
    value: fn(&Exporter) -> Option<&str>,
}

#[rustfmt::skip] // a table
/// The labels that come from exporters and from tags.
pub const SCRAPE_LABELS: [ScrapeLabel; 9] = [
    ScrapeLabel { name: "job", about: "name of the exporter; absent if it has none: the scrape config's `job_name` holds", value: |e| e.name.as_deref() },
    ScrapeLabel { name: "__meta_balena_exporter", about: "name of the exporter; stays when relabelling changes `job`; absent if it has none", value: |e| e.name.as_deref() },
    ScrapeLabel { name: SERVICE, about: "name of the service whose labels declare the exporter; absent if a tag or an option does", value: |e| e.service.as_deref().filter(|name| name.len() <= MAX_VALUE_SIZE) },
    ScrapeLabel { name: "__meta_balena_tag_<key>", about: "value of a tag of the device, the key reduced to `[a-zA-Z0-9_]`", value: |_| None },
    ScrapeLabel { name: "__meta_balena_fleet_tag_<key>", about: "value of a tag of its fleet", value: |_| None },
    ScrapeLabel { name: "__scheme__", about: "`https` in `public`; else from the tag or label `prometheus.io.scheme`", value: |e| e.scheme },
    ScrapeLabel { name: "__metrics_path__", about: "path of the exporter; absent if it names none: the scrape config's `metrics_path` holds", value: |e| e.path.as_deref() },
    ScrapeLabel { name: "__scrape_interval__", about: "from the tag or label `prometheus.io.interval`", value: |e| e.interval.as_ref().map(|(text, _)| &**text) },
    ScrapeLabel { name: "__scrape_timeout__", about: "from the tag or label `prometheus.io.timeout`; else 10s, or the interval if it is shorter; absent without an interval", value: |e| e.timeout.as_ref().map(|(text, _)| &**text) },
];

/// A label of `balena_device_info` only: `false` where the tag `prometheus.io/alert` mutes the device, else absent. No target has
/// it, so that muting a device starts no new series of its exporters.
pub const ALERT: &str = "alert";

/// The label with the name of the device.
pub const DEVICE_NAME: &str = "device_name";
/// The label with the name of the device, where it is for relabelling only.
pub const META_DEVICE_NAME: &str = "__meta_balena_device_name";
/// The labels that each device has for itself. All others are common to many.
const OWN: [&str; 3] = [DEVICE_NAME, UUID, DEVICE_ID];
/// The label that every target has.
pub const UUID: &str = "uuid";
/// The label by which the target file is read again after a restart.
pub const DEVICE_ID: &str = "__meta_balena_device_id";
/// The beginning of the names of labels for relabelling.
const META_PREFIX: &str = "__meta_balena_";
/// The label with the name of the service that declares the exporter.
pub const SERVICE: &str = "__meta_balena_service";
/// Label values longer than this, in bytes, are left out. Not more than `label_value_length_limit` of `prometheus.yml`, which
/// fails the scrape of a target with a longer one.
pub const MAX_VALUE_SIZE: usize = 512;
/// Tags of a device or a fleet that become labels: a device can give itself any number of tags.
const MAX_TAGS: usize = 64;

/// The labels that can stay on every series.
pub fn plain() -> impl Iterator<Item = &'static Label> {
    LABELS.iter().filter(|label| label.is_plain())
}

/// The labels that other devices have, too, each with its value, if that is not too long.
fn common<'d>(device: &'d Device) -> impl Iterator<Item = (&'static Label, Option<Cow<'d, str>>)> {
    let labels = LABELS.iter().filter(|label| !OWN.contains(&label.name));
    labels.map(|label| (label, (label.value)(device).filter(|value| value.len() <= MAX_VALUE_SIZE)))
}

/// The labels that the targets of a device have in common with those of others, as members of a JSON object with a comma
/// before each: those before the id of the device, those after it, and those that come from tags of its fleet. Of the plain
/// labels, the `chosen` ones stay on every series.
pub fn of_targets(tags: &mut Tags, chosen: &[&str]) -> [Box<str>; 3] {
    let [mut before, mut after] = [String::new(), String::new()];
    for (label, value) in common(tags.device) {
        let Some(value) = value else { continue };
        if !label.is_plain() {
            member(&mut after, label.name, &value);
        } else if chosen.contains(&label.name) {
            member(&mut before, label.name, &value);
        } else {
            member(&mut before, &format!("{META_PREFIX}{}", label.name), &value);
        }
    }
    [before.into(), after.into(), of_tags(tags, false)]
}

/// The labels of `balena_device_info` that other devices have, too, in the text format 0.0.4 with a comma before each. Absent
/// and too long ones are empty. A device that is not muted has no label [`ALERT`].
pub fn of_info(device: &Device, is_muted: bool) -> Box<str> {
    let mut info = String::with_capacity(256);
    for (label, value) in common(device) {
        if let Some(name) = label.info {
            let _ = write!(info, ",{name}=\"{}\"", escape(&value.unwrap_or_default())); // into a String: cannot fail
        }
    }
    if is_muted {
        let _ = write!(info, ",{ALERT}=\"false\"");
    }
    info.into()
}

/// The labels of `balena_device_info` that a device has for itself, in the text format 0.0.4.
pub fn own_info(uuid: &str, name: &str) -> String {
    let name = if name.len() <= MAX_VALUE_SIZE { escape(name) } else { String::new() };
    format!("{UUID}=\"{uuid}\",{DEVICE_NAME}=\"{name}\"")
}

/// The labels of one exporter of a device, as members of a JSON object with a comma before each.
pub fn of_exporter(exporter: &Exporter) -> Box<str> {
    let mut labels = String::new();
    for label in SCRAPE_LABELS {
        if let Some(value) = (label.value)(exporter) {
            member(&mut labels, label.name, value);
        }
    }
    labels.into()
}

/// Adds a member of a JSON object, with a comma before it.
pub fn member(out: &mut String, name: &str, value: &str) {
    let value = serde_json::to_string(value).unwrap_or_default(); // text is always JSON
    for part in [",\"", name, "\":", &value] {
        out.push_str(part);
    }
}

/// A label value in the text format 0.0.4.
pub fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The labels of a device's own tags or of those of its fleet, as members of a JSON object with a comma before each.
pub fn of_tags(tags: &mut Tags, is_own: bool) -> Box<str> {
    let device = tags.device;
    let (kind, all) = if is_own { ("tag_", device.tags()) } else { ("fleet_tag_", device.fleet_tags()) };
    let pairs = all.iter().filter_map(|tag| tag.key.as_deref().zip(tag.value.as_deref())); // null is no label
    let mut pairs: Vec<_> = pairs.collect();
    // The API may return tags in any order. The same tags must give the same bytes.
    pairs.sort_unstable();
    if pairs.len() > MAX_TAGS {
        let (owner, count) = (tags.owner(is_own), pairs.len());
        tags.warnings.push(format!("{owner} has {count} {kind}* labels; only the first {MAX_TAGS} are attached"));
        pairs.truncate(MAX_TAGS);
    }
    let (mut labels, mut names) = (String::new(), Vec::<String>::new());
    for (key, value) in pairs {
        // Prometheus 2 takes no other characters in the name of a label.
        let legal = key.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' });
        let name: String = META_PREFIX.chars().chain(kind.chars()).chain(legal).collect();
        if names.contains(&name) {
            let owner = tags.owner(is_own);
            tags.warnings.push(format!("{owner} has two tags that become the label {name}; {key:?} is left out"));
            continue;
        }
        if value.len() <= MAX_VALUE_SIZE {
            member(&mut labels, &name, value);
        } else if !key.starts_with(PREFIX) {
            tags.warn(key, is_own, &format!("becomes no label: it is longer than {MAX_VALUE_SIZE} bytes"));
        }
        names.push(name);
    }
    labels.into()
}

#[allow(clippy::ref_option)] // a reference to a field of a device
fn text<'d>(text: &'d Option<Text>) -> Option<Cow<'d, str>> {
    text.as_deref().filter(|text| !text.is_empty()).map(Cow::Borrowed)
}

fn number(number: Option<u64>) -> Option<Cow<'static, str>> {
    number.map(|number| number.to_string().into())
}
