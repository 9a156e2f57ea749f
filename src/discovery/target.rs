//! A device and the rules → target groups, as Prometheus' `file_sd_configs` takes them. Pure functions.

use std::borrow::Cow;
use std::net::IpAddr;

use serde::{Serialize, Serializer};

use crate::balena::device::{Device, Tag, Text, one};
use crate::discovery::exporter::Exporter;
use crate::discovery::steering::{self as tag, Steering, TagFilter};

/// How Prometheus reaches a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// `<uuid>.balena:<port>`, the name that balena's VPN proxy takes.
    Vpn,
    /// `<uuid>.<domain>:443`, the public device URL, which leads to port 80 of the device.
    Public,
    /// The first usable of the addresses that the supervisor reports.
    Lan,
}

/// What makes targets of devices.
#[derive(Clone, Debug)]
pub struct Rules {
    /// How a device is reached.
    pub address: Address,
    /// What listens on each device, unless a tag says otherwise.
    pub exporters: Vec<Exporter>,
    /// The domain of public device URLs.
    pub public_domain: String,
    /// Names of the plain labels that are attached.
    pub labels: Vec<&'static str>,
    /// Leave out devices that are not connected to the VPN.
    pub online_only: bool,
    /// Tags that a device must have, its own beating its fleet's.
    pub tags: Vec<TagFilter>,
}

/// A label of a target.
pub struct Label {
    /// Its name; a plain one that is not chosen is there as `__meta_balena_<name>` instead.
    pub name: &'static str,
    /// What it holds, and when it is absent.
    pub about: &'static str,
    value: for<'d> fn(&'d Device<'_>) -> Option<Cow<'d, str>>,
}

#[rustfmt::skip] // a table
/// Labels that stay on every series, as the tutorial has them.
pub const PLAIN: [Label; 8] = [
    Label { name: "device_name", about: "name of the device; not unique", value: |d| text(&d.device_name) },
    Label { name: UUID, about: "uuid of the device; always there", value: |d| d.uuid().map(Cow::Borrowed) },
    Label { name: "device_type", about: "type of the device, `raspberrypi4-64`", value: |d| text(&one(&d.device_type)?.slug) },
    Label { name: "fleet", about: "slug of its fleet, `organization/name`; absent without a fleet", value: |d| text(&one(&d.fleet)?.slug) },
    Label { name: "commit", about: "commit of the release that it runs; absent before the first", value: |d| text(&one(&d.release)?.commit) },
    Label { name: "os_version", about: "`balenaOS 6.1.24`", value: |d| text(&d.os_version) },
    Label { name: "os_variant", about: "`prod` or `dev`; absent if unknown", value: |d| text(&d.os_variant) },
    Label { name: "supervisor_version", about: "version of its supervisor", value: |d| text(&d.supervisor_version) },
];

#[rustfmt::skip] // a table
/// Labels for relabelling, which Prometheus drops after that.
pub const META: [Label; 5] = [
    Label { name: DEVICE_ID, about: "id of the device in balena's database", value: |d| number(d.id) },
    Label { name: "__meta_balena_fleet_name", about: "name of its fleet; not unique across organizations", value: |d| text(&one(&d.fleet)?.app_name) },
    Label { name: "__meta_balena_fleet_id", about: "id of its fleet", value: |d| number(one(&d.fleet)?.id) },
    Label { name: "__meta_balena_organization", about: "handle of the organization that owns the fleet", value: |d| text(&one(&one(&d.fleet)?.organization)?.handle) },
    Label { name: "__meta_balena_release", about: "version of the release that it runs, `1.2.3`", value: |d| text(&one(&d.release)?.raw_version) },
];

/// Labels that come from tags and exporters: name, what it holds and when it is absent.
pub const STEERED: [(&str, &str); 8] = [
    (JOB, "name of the exporter; absent if it has none: the scrape config's `job_name` holds"),
    (EXPORTER, "name of the exporter, again, since relabelling may change `job`; absent if it has none"),
    ("__meta_balena_tag_<key>", "value of a tag of the device, the key reduced to `[a-zA-Z0-9_]`"),
    ("__meta_balena_fleet_tag_<key>", "value of a tag of its fleet"),
    (SCHEME, "`https` in `public`; else from the tag `prometheus.io/scheme`"),
    (METRICS_PATH, "path of the exporter; absent if it names none: the scrape config's `metrics_path` holds"),
    (INTERVAL, "from the tag `prometheus.io/interval`"),
    (TIMEOUT, "the same, where the interval is below Prometheus' time-out of 10s"),
];

/// The label that every target has.
pub const UUID: &str = "uuid";
/// The label by which the target file is read again after a restart.
pub const DEVICE_ID: &str = "__meta_balena_device_id";
/// What stands before the name of a label for relabelling.
pub const META_PREFIX: &str = "__meta_balena_";
/// The label with the name of the exporter.
pub const JOB: &str = "job";
const EXPORTER: &str = "__meta_balena_exporter";
/// The label that says https where Prometheus would take http.
pub const SCHEME: &str = "__scheme__";
/// The label with a path that is not `/metrics`.
pub const METRICS_PATH: &str = "__metrics_path__";
const INTERVAL: &str = "__scrape_interval__";
const TIMEOUT: &str = "__scrape_timeout__";

/// Label values longer than this, in bytes, are left out.
const LONGEST_VALUE: usize = 1024;
/// Of each owner's tags no more than this become labels: a device can give itself any number of them.
const MOST_TAGS: usize = 64;

#[allow(clippy::ref_option)] // a field, as it is
fn text<'d>(text: &'d Option<Text>) -> Option<Cow<'d, str>> {
    text.as_deref().filter(|text| !text.is_empty()).map(Cow::Borrowed)
}

fn number(number: Option<u64>) -> Option<Cow<'static, str>> {
    number.map(|number| number.to_string().into())
}

/// Why a device is not among the targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// One word for it, for metrics.
    pub reason: &'static str,
    /// For people: what is the matter with the device.
    pub why: Cow<'static, str>,
}

impl LeftOut {
    /// Left out for this reason.
    pub fn new(reason: &'static str, why: impl Into<Cow<'static, str>>) -> Self {
        LeftOut { reason, why: why.into() }
    }
}

/// Writes the target groups of a device to `out`, one a line with `,\n` between, as in the list around them, and
/// returns how many; what is amiss but not fatal goes to `warnings`, with the device's name.
pub fn map(device: &Device, rules: &Rules, out: &mut Vec<u8>, warnings: &mut Vec<String>) -> Result<usize, LeftOut> {
    if let Some(error) = &device.broken {
        return Err(LeftOut::new("broken", format!("the API's record of it cannot be used: {error}")));
    }
    device.id.ok_or(LeftOut::new("no_id", "the API's record of it has no id"))?;
    let uuid = device.uuid().ok_or(LeftOut::new("bad_uuid", "its uuid is not 32 or 62 hex digits"))?;
    if let Some(wanted) = rules.tags.iter().find(|wanted| !wanted.matches(device)) {
        let why = format!("its own tag {} is another than the one asked for", wanted.key);
        return Err(LeftOut::new("not_tagged", why));
    }
    let steering = tag::steer(device, warnings);
    if steering.scrape == Some(false) {
        return Err(LeftOut::new("switched_off", "the tag prometheus.io/scrape switches it off"));
    }
    if rules.online_only && device.is_online != Some(true) {
        return Err(LeftOut::new("offline", "balenaCloud sees it offline"));
    }
    let host = match rules.address {
        Address::Vpn => format!("{uuid}.balena"),
        Address::Public if device.is_web_accessible != Some(true) => {
            return Err(LeftOut::new("no_public_url", "its public device URL is switched off"));
        }
        Address::Public => format!("{uuid}.{}", rules.public_domain),
        Address::Lan => lan_host(device).ok_or(LeftOut::new("no_lan_address", "it reports no usable LAN address"))?,
    };
    let labels = labels(device, rules, warnings);
    let mut written: Vec<(Option<&str>, String)> = Vec::new();
    for exporter in steering.exporters.as_ref().unwrap_or(&rules.exporters) {
        let port = if rules.address == Address::Public { 443 } else { exporter.port };
        let identity = (exporter.name.as_deref(), format!("{host}:{port}"));
        if written.contains(&identity) {
            let name = device.display_name();
            warnings.push(format!("{name}: tag {} has {exporter} twice; the later one is left out", tag::EXPORTERS));
            continue;
        }
        if !written.is_empty() {
            out.extend_from_slice(b",\n");
        }
        let own = exporter_labels(exporter, rules.address, &steering);
        let group = Group { targets: [&identity.1], labels: [&labels, &own] };
        let _ = serde_json::to_writer(&mut *out, &group); // text into memory cannot fail
        written.push(identity);
    }
    Ok(written.len())
}

type Pair<'a> = (Cow<'a, str>, Cow<'a, str>);

/// What all exporters of a device have in common, each fact once.
fn labels<'a>(device: &'a Device, rules: &Rules, warnings: &mut Vec<String>) -> Vec<Pair<'a>> {
    let mut labels: Vec<Pair> =
        Vec::with_capacity(PLAIN.len() + META.len() + device.tags().len() + device.fleet_tags().len());
    for label in &PLAIN {
        let Some(value) = (label.value)(device) else { continue };
        let chosen = label.name == UUID || rules.labels.contains(&label.name);
        labels.push((if chosen { label.name.into() } else { format!("{META_PREFIX}{}", label.name).into() }, value));
    }
    labels.extend(META.iter().filter_map(|label| Some((label.name.into(), (label.value)(device)?))));
    for (kind, tags) in [("tag_", device.tags()), ("fleet_tag_", device.fleet_tags())] {
        // The API answers tags in any order, and the same devices always give the same bytes.
        let key_and_value = |tag: &'a Tag| tag.key.as_deref().zip(tag.value.as_deref()); // null is no label
        let mut tags: Vec<(&str, &str)> = tags.iter().filter_map(key_and_value).collect();
        tags.sort_unstable();
        if tags.len() > MOST_TAGS {
            let (name, count) = (device.display_name(), tags.len());
            warnings.push(format!("{name} has {count} {kind}* labels; only the first {MOST_TAGS} are attached"));
            tags.truncate(MOST_TAGS);
        }
        for (key, value) in tags {
            // what a label name may hold in Prometheus 2
            let legal = key.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' });
            let name: String = META_PREFIX.chars().chain(kind.chars()).chain(legal).collect();
            if labels.iter().all(|(known, _)| *known != name) {
                labels.push((name.into(), value.into()));
            } else {
                let device = device.display_name();
                warnings.push(format!("{device} has two tags that become the label {name}; {key:?} is left out"));
            }
        }
    }
    labels.retain(|(_, value)| value.len() <= LONGEST_VALUE);
    labels
}

fn exporter_labels<'a>(exporter: &'a Exporter, address: Address, steering: &Steering<'a>) -> Vec<Pair<'a>> {
    let mut labels: Vec<Pair> = Vec::with_capacity(6);
    if let Some(name) = &exporter.name {
        labels.push((JOB.into(), name.into()));
        labels.push((EXPORTER.into(), name.into()));
    }
    let scheme = if address == Address::Public { Some("https") } else { steering.scheme };
    labels.extend(scheme.map(|scheme| (SCHEME.into(), scheme.into())));
    labels.extend(exporter.path.as_deref().map(|path| (METRICS_PATH.into(), path.into())));
    if let Some((interval, millis)) = steering.interval {
        labels.push((INTERVAL.into(), interval.into()));
        // Prometheus drops a target whose interval is shorter than its time-out.
        if millis < 10_000 {
            labels.push((TIMEOUT.into(), interval.into()));
        }
    }
    labels
}

/// IPv4 before IPv6, which stands in brackets.
fn lan_host(device: &Device) -> Option<String> {
    let addresses = device.ip_address.as_deref()?.split_whitespace().filter_map(|text| text.parse::<IpAddr>().ok());
    let usable: Vec<_> = addresses.map(|address| address.to_canonical()).filter(is_usable).collect();
    usable.iter().find(|address| address.is_ipv4()).or(usable.first()).map(|address| match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    })
}

fn is_usable(address: &IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !(link_local || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

#[derive(Serialize)]
struct Group<'a> {
    targets: [&'a str; 1],
    #[serde(serialize_with = "as_map")]
    labels: [&'a [Pair<'a>]; 2],
}

fn as_map<S: Serializer>(labels: &[&[Pair]; 2], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(labels.iter().copied().flatten().map(|(name, value)| (name, value)))
}
