//! A device and the rules → its targets. Pure functions.

use std::net::IpAddr;
use std::sync::Arc;

use super::device_exporters::{self, DeviceExporters, Origin};
use super::entry::{Common, Commons, DeviceTarget, Entry, ListedFleet};
use super::exporter::Exporter;
use super::label_prefix::PREFIX;
use super::labels::{self, DEVICE_NAME, LABELS};
use super::lan::{self, Lan};
use super::left_out::{LeftOut, LeftOutReason};
use super::muting::is_muted;
use super::service_labels::Declared;
use super::tags::{EXPORTERS, OwnTags, Tags};
use crate::balena::{Device, TagFilter};
use crate::word_enum::words;

words! {
    /// How Prometheus reaches a device.
    Address {
    /// `<uuid>.balena:<port>`, the name that balena's VPN proxy takes.
    Vpn = "vpn",
    /// `<uuid>.<domain>:443`, the public device URL, which leads to port 80 of the device.
    Public = "public",
    /// The first address that the supervisor reports and that is in a network of devices.
    Lan = "lan",
    }
}

#[derive(Clone, Debug)]
pub struct Rules {
    pub address: Address,
    /// The exporters of each device, unless a tag or a label of a service names others.
    pub exporters: Vec<Exporter>,
    pub own_tags: OwnTags,
    pub public_domain: String,
    pub lan: Lan,
    /// The plain labels that stay on every series, by their names.
    pub labels: Vec<&'static str>,
    pub service_labels: bool,
    /// Leave out devices that are not connected to the VPN.
    pub online_only: bool,
    /// Tags that a device must have. A tag of the device beats the same tag of its fleet.
    pub tags: Vec<TagFilter>,
}

impl Rules {
    /// The fields of a device that the mapping needs.
    pub fn fields(&self) -> impl Iterator<Item = &'static str> {
        let online = (self.online_only || self.address == Address::Lan).then_some("is_connected_to_vpn");
        let address = match self.address {
            Address::Vpn => None,
            Address::Public => Some("is_web_accessible"),
            Address::Lan => Some("ip_address"),
        };
        LABELS.iter().filter_map(|label| label.field).chain(online).chain(address)
    }
}

/// LAN addresses of a device that are kept, beside that of its targets.
const MAX_ADDRESSES: usize = 16;
const ONLY_PORT_80: &str = "a public device URL leads to port 80 only";
const IGNORED_EXPORTERS: &str = "only its own tag names an exporter, and that is ignored (--own-tags)";
/// The API names no release of a device if that was deleted, although the device still runs it.
const NO_RELEASE: &str = "the API has no release that it runs (was it deleted?), so no service label, and no tag and no option names an exporter";

/// Maps a device. `declared` is what the release that it runs declares. Problems that do not leave the device out go to
/// `warnings`, with its name.
pub fn map(
    device: &Device, declared: Option<&Arc<Declared>>, rules: &Rules, commons: &mut Commons, warnings: &mut Vec<String>,
) -> Entry {
    let mut tags = Tags::new(device, rules.own_tags, warnings);
    let mut common = Common {
        fleet: ListedFleet::of(&mut tags),
        release: device.release_id(),
        info: labels::of_info(device, is_muted(&mut tags)),
        ..Common::default()
    };
    let targets = targets(&mut tags, declared.map(|declared| &**declared), rules, &mut common);
    common.declared = declared.cloned();
    let mut entry = Entry::new(device, commons.share(common));
    let mut of_targets = None;
    match targets {
        Ok(address) => {
            of_targets = address;
            entry.tag_labels = labels::of_tags(&mut tags, true);
        }
        Err(left_out) => entry.left_out = Some(left_out.into()),
    }
    if rules.address == Address::Lan {
        let others = lan::reported(device).filter(|address| Some(*address) != of_targets);
        entry.addresses = of_targets.into_iter().chain(others.take(MAX_ADDRESSES)).collect();
    }
    entry
}

/// Adds the targets of a device, and the labels that they have in common with those of other devices. Returns its LAN address, if
/// it is reached by that.
fn targets(
    tags: &mut Tags, declared: Option<&Declared>, rules: &Rules, common: &mut Common,
) -> Result<Option<IpAddr>, LeftOut> {
    let device = tags.device;
    if let Some(what) = &device.broken {
        return Err(LeftOut { reason: LeftOutReason::Broken, detail: what.as_str().into() });
    }
    device.id.ok_or(LeftOutReason::NoId)?;
    device.uuid().ok_or(LeftOutReason::BadUuid)?;
    if let Some(wanted) = rules.tags.iter().find(|wanted| !wanted.matches(device)) {
        return Err(LeftOut { reason: LeftOutReason::NotTagged, detail: wanted.key.as_str().into() });
    }
    let found = device_exporters::of(tags, declared, &rules.exporters);
    if found.is_off {
        return Err(LeftOutReason::SwitchedOff.into());
    }
    if rules.online_only && device.is_connected_to_vpn != Some(true) {
        return Err(LeftOutReason::Offline.into());
    }
    let address = address(device, rules)?;
    common.origin = found.origin;
    common.targets = reachable(tags, found, rules)?;
    common.host_suffix = match rules.address {
        Address::Vpn => ".balena".into(),
        Address::Public => format!(".{}", rules.public_domain).into(),
        Address::Lan => "".into(),
    };
    common.has_name_label = rules.labels.contains(&DEVICE_NAME);
    common.labels = labels::of_targets(tags, &rules.labels);
    Ok(address)
}

/// The exporters that the address leads to, each once.
fn reachable(tags: &mut Tags, found: DeviceExporters, rules: &Rules) -> Result<Vec<DeviceTarget>, LeftOut> {
    let device = tags.device;
    let is_public = rules.address == Address::Public;
    let (mut targets, mut unreachable): (Vec<DeviceTarget>, _) = (Vec::new(), Vec::new());
    for mut exporter in found.exporters {
        let shown = exporter.to_string();
        if is_public {
            // An exporter that no service declares is taken for what answers at the public URL.
            if let Some(service) = exporter.service.as_ref().filter(|_| exporter.port != 80) {
                unreachable.push(format!("{service} at {}", exporter.port));
                continue;
            }
            let by_tag = matches!(found.origin, Origin::DeviceTag | Origin::FleetTag);
            if exporter.port != 80 && by_tag {
                let owner = tags.owner(found.origin == Origin::DeviceTag);
                tags.warnings.push(format!(
                    "{owner}: a tag names the exporter {shown}: {ONLY_PORT_80}, {} is not used",
                    exporter.port
                ));
            }
            (exporter.port, exporter.scheme) = (443, Some("https"));
        }
        let is_same = |known: &Exporter| known.port == exporter.port && known.name == exporter.name;
        if targets.iter().any(|target| is_same(&target.exporter)) {
            let name = device.display_name();
            let source = match found.origin {
                Origin::DeviceTag | Origin::FleetTag => format!("{PREFIX}/{EXPORTERS}"),
                Origin::ServiceLabel | Origin::Option => found.origin.as_str().to_owned(),
            };
            tags.warnings.push(format!("{name}: {source} names {shown} twice; the later one is left out"));
            continue;
        }
        targets.push(DeviceTarget { labels: labels::of_exporter(&exporter), exporter });
    }
    if !unreachable.is_empty() {
        let what = unreachable.join(", ");
        if targets.is_empty() {
            return Err(LeftOut {
                reason: LeftOutReason::NoExporter,
                detail: format!("{what}: {ONLY_PORT_80}").into(),
            });
        }
        tags.warnings.push(format!("{}: {what} is left out: {ONLY_PORT_80}", device.display_name()));
    }
    if targets.is_empty() {
        let detail = match &device.release {
            _ if found.ignores_exporters => IGNORED_EXPORTERS,
            None if rules.service_labels => NO_RELEASE,
            _ => "",
        };
        return Err(LeftOut { reason: LeftOutReason::NoExporter, detail: detail.into() });
    }
    Ok(targets)
}

/// The LAN address of every target of a device, where it is reached by that.
fn address(device: &Device, rules: &Rules) -> Result<Option<IpAddr>, LeftOut> {
    match rules.address {
        Address::Vpn => Ok(None),
        Address::Public if device.is_web_accessible == Some(true) => Ok(None),
        Address::Public => Err(LeftOutReason::NoPublicUrl.into()),
        Address::Lan => rules.lan.address(device).map(Some),
    }
}
