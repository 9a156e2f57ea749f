//! A device and the rules → target groups, as Prometheus' `file_sd_configs` takes them. Pure functions.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, Serializer};

use super::exporter::Exporter;
use super::labels::{self, LabelSet, Pair};
use super::lan::{Lan, Unreachable};
use super::left_out::{LeftOut, LeftOutReason};
use super::services::Declared;
use super::steering::{self, Origin, Scraped};
use super::tags::{self, OwnTags};
use crate::balena::device::Device;
use crate::balena::selection::TagFilter;

/// How Prometheus reaches a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// `<uuid>.balena:<port>`, the name that balena's VPN proxy takes.
    Vpn,
    /// `<uuid>.<domain>:443`, the public device URL, which leads to port 80 of the device.
    Public,
    /// The first address that the supervisor reports and that is in a network of devices.
    Lan,
}

impl Address {
    /// The option's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Address::Vpn => "vpn",
            Address::Public => "public",
            Address::Lan => "lan",
        }
    }

    /// The field of a device that it needs.
    fn field(self) -> Option<&'static str> {
        match self {
            Address::Vpn => None,
            Address::Public => Some("is_web_accessible"),
            Address::Lan => Some("ip_address"),
        }
    }
}

/// How devices become targets.
#[derive(Clone, Debug)]
pub struct Rules {
    /// How a device is reached.
    pub address: Address,
    /// The exporters of each device, unless a tag or a label of a service names others.
    pub exporters: Vec<Exporter>,
    /// What a device's own tags may change.
    pub own_tags: OwnTags,
    /// The domain of public device URLs.
    pub public_domain: String,
    /// Where the devices of a LAN are.
    pub lan: Lan,
    /// The labels of a target.
    pub labels: LabelSet,
    /// Leave out devices that are not connected to the VPN.
    pub online_only: bool,
    /// Tags that a device must have. A tag of the device beats the same tag of its fleet.
    pub tags: Vec<TagFilter>,
}

/// Every device as a target in the VPN, with all labels and no exporter.
impl Default for Rules {
    fn default() -> Self {
        Rules {
            address: Address::Vpn,
            exporters: Vec::new(),
            own_tags: OwnTags::default(),
            public_domain: "balena-devices.com".into(),
            lan: Lan::default(),
            labels: LabelSet::default(),
            online_only: false,
            tags: Vec::new(),
        }
    }
}

impl Rules {
    /// The fields of a device that the mapping needs.
    pub fn fields(&self) -> impl Iterator<Item = &'static str> {
        let online = self.online_only.then_some("is_connected_to_vpn");
        self.labels.fields().chain(online).chain(self.address.field())
    }

    /// The labels of a device's `balena_device_info`: its own, and those that others have, too.
    pub fn info(&self, uuid: &str, device: &Device) -> [String; 2] {
        self.labels.info(uuid, device, steering::is_muted(device, self.own_tags))
    }
}

const IGNORED_EXPORTERS: &str = "only its own tag names an exporter, and that is ignored (--own-tags)";

/// What became of a device that has targets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapped {
    /// How many target groups were written.
    pub targets: usize,
    /// Where its exporters come from.
    pub origin: Origin,
}

/// Writes the target groups of a device to `out`, one a line with `,\n` between them. `declared` is what the release that it runs
/// declares. Problems that do not leave the device out go to `warnings`, with its name.
///
/// # Errors
/// The device has no targets.
pub fn map(
    device: &Device, declared: Option<&Declared>, rules: &Rules, out: &mut Vec<u8>, warnings: &mut Vec<String>,
) -> Result<Mapped, LeftOut> {
    if let Some(what) = &device.broken {
        return Err(LeftOut { reason: LeftOutReason::Broken, detail: what.as_str().into() });
    }
    device.id.ok_or(LeftOutReason::NoId)?;
    let uuid = device.uuid().ok_or(LeftOutReason::BadUuid)?;
    if let Some(wanted) = rules.tags.iter().find(|wanted| !wanted.matches(device)) {
        return Err(LeftOut { reason: LeftOutReason::NotTagged, detail: wanted.key.as_str().into() });
    }
    let steering = steering::of(device, declared, &rules.exporters, rules.own_tags, warnings);
    if steering.is_off {
        return Err(LeftOutReason::SwitchedOff.into());
    }
    if rules.online_only && device.is_connected_to_vpn != Some(true) {
        return Err(LeftOutReason::Offline.into());
    }
    let host = host(device, uuid, rules)?;
    let labels = rules.labels.of(device, warnings);
    let mut written: Vec<(Option<&str>, String)> = Vec::new();
    for scraped in steering.exporters.iter().filter(|scraped| unreachable(scraped, rules).is_none()) {
        let exporter = &*scraped.exporter;
        let port = if rules.address == Address::Public { 443 } else { exporter.port };
        let identity = (exporter.name.as_deref(), format!("{host}:{port}"));
        if written.contains(&identity) {
            let name = device.display_name();
            let source = match steering.origin {
                Origin::DeviceTag | Origin::FleetTag => tags::EXPORTERS,
                Origin::ServiceLabel | Origin::Option => steering.origin.as_str(),
            };
            warnings.push(format!("{name}: {source} names {exporter} twice; the later one is left out"));
            continue;
        }
        if !written.is_empty() {
            out.extend_from_slice(b",\n");
        }
        let own = labels::of_exporter(scraped, (rules.address == Address::Public).then_some("https"));
        let group = Group { targets: [identity.1.as_str()], labels: Labels([&labels, &own]) };
        let _ = serde_json::to_writer(&mut *out, &group); // text into memory cannot fail
        written.push(identity);
    }
    let unreachable: Vec<_> = steering.exporters.iter().filter_map(|scraped| unreachable(scraped, rules)).collect();
    if !unreachable.is_empty() {
        let what = unreachable.join(", ");
        let only = "a public device URL leads to port 80 only";
        if written.is_empty() {
            return Err(LeftOut { reason: LeftOutReason::NoExporter, detail: format!("{what}: {only}").into() });
        }
        warnings.push(format!("{}: {what} is left out: {only}", device.display_name()));
    }
    if written.is_empty() {
        let detail = if steering.ignores_exporters { IGNORED_EXPORTERS } else { "" };
        return Err(LeftOut { reason: LeftOutReason::NoExporter, detail: detail.into() });
    }
    Ok(Mapped { targets: written.len(), origin: steering.origin })
}

/// The service and port of an exporter that no public device URL leads to.
fn unreachable(scraped: &Scraped, rules: &Rules) -> Option<String> {
    let port = scraped.exporter.port;
    let service = scraped.service.filter(|_| rules.address == Address::Public && port != 80)?;
    Some(format!("{service} at {port}"))
}

/// The host of every target of a device.
fn host(device: &Device, uuid: &str, rules: &Rules) -> Result<String, LeftOut> {
    match rules.address {
        Address::Vpn => Ok(format!("{uuid}.balena")),
        Address::Public if device.is_web_accessible == Some(true) => Ok(format!("{uuid}.{}", rules.public_domain)),
        Address::Public => Err(LeftOutReason::NoPublicUrl.into()),
        Address::Lan => rules.lan.host(device).map_err(|unreachable| match unreachable {
            Unreachable::NoAddress => LeftOutReason::NoLanAddress.into(),
            Unreachable::Refused(detail) => LeftOut { reason: LeftOutReason::LanAddressRefused, detail: detail.into() },
        }),
    }
}

/// A target group, as it is written and as it is read.
#[derive(Deserialize, Serialize)]
pub struct Group<Targets, Labels> {
    /// `host:port` of each target.
    pub targets: Targets,
    /// Their labels.
    pub labels: Labels,
}

/// A target group of our own list, as it is read. It has one target.
pub type ReadGroup<'a> = Group<[Cow<'a, str>; 1], BTreeMap<Cow<'a, str>, Cow<'a, str>>>;

impl ReadGroup<'_> {
    /// The value of a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(|value| &**value)
    }
}

/// Reads the target groups of a device, as [`map`] wrote them.
pub fn read_groups(text: &[u8]) -> impl Iterator<Item = ReadGroup<'_>> {
    let lines = text.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b",").unwrap_or(line));
    lines.filter_map(|line| serde_json::from_slice(line).ok())
}

struct Labels<'a>([&'a [Pair<'a>]; 2]);

impl Serialize for Labels<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied().flatten().map(|(name, value)| (name, value)))
    }
}
