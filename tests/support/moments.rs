//! A fleet that changes at each refresh. The name of every device has the moment that it belongs to, so that a list shows if it
//! lacks devices or mixes two moments.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::{fs, io};

use super::cloud::{Cloud, Reply};
use super::rules;
use super::sidecar::{self, Running};

#[derive(Default)]
pub struct Moments {
    moment: AtomicU64,
    driven: AtomicU32,
}

impl Moments {
    /// From now on this cloud has about this many devices, and the next moment begins whenever the first page is asked for.
    pub fn of(cloud: &Cloud, devices: u64) -> Arc<Self> {
        let moments = Arc::new(Moments::default());
        let now = moments.clone();
        cloud.intercept(move |seen, _| {
            let number = |before| seen.target.split_once(before)?.1.split([')', '&']).next()?.parse::<u64>().ok();
            let (after, top) = (number("(id%20gt%20")?, number("$top=")?);
            let first = after == 0;
            let moment = if first { now.moment.fetch_add(1, SeqCst) + 1 } else { now.moment.load(SeqCst) };
            let driven = now.driven.load(SeqCst);
            if first && driven != 0 {
                let _ = sidecar::send(driven, "HUP"); // it may just have been killed
            }
            let ids = after + 1..=(after + top).min(size(moment, devices));
            let page: Vec<_> = ids.map(|id| device(id, moment, devices)).collect();
            Some(Reply::status(200, &[], format!("{{\"d\":[{}]}}", page.join(",")).as_bytes()))
        });
        moments
    }

    /// This sidecar, if any, gets SIGHUP as soon as a refresh begins, so that it refreshes without a pause.
    pub fn drive(&self, running: Option<&Running>) {
        self.driven.store(running.map_or(0, Running::id), SeqCst);
    }
}

fn size(moment: u64, devices: u64) -> u64 {
    devices - moment % 10
}

fn device(id: u64, moment: u64, devices: u64) -> String {
    format!(
        r#"{{"id":{id},"uuid":"{id:032x}","device_name":"{moment} of {devices}","os_version":"balenaOS 6.1.24","os_variant":"prod",
        "supervisor_version":"16.7.6","is_of__device_type":[{{"slug":"raspberrypi3"}}],"is_running__release":[],
        "belongs_to__application":[{{"id":1,"app_name":"gateways","slug":"acme/gateways","organization":[],"application_tag":[]}}],
        "device_tag":[]}}"#
    )
}

/// The moment of a list, if the list is whole.
pub fn moment(list: &[u8]) -> Result<u64, String> {
    let groups = rules::groups(list)?;
    let name = groups.first().and_then(|group| group.label("device_name")).ok_or("an empty list")?;
    let (moment, devices) = name.split_once(" of ").ok_or_else(|| format!("a device with the name {name}"))?;
    let [moment, devices] = [moment, devices].map(|number| number.parse().unwrap_or_default());
    if groups.len() as u64 != size(moment, devices) {
        return Err(format!("{} of {} devices", groups.len(), size(moment, devices)));
    }
    for (id, group) in (1..).zip(&groups) {
        if group.id()? != id || group.label("device_name") != Some(name) {
            return Err(format!("device {id} in the list of moment {moment}: {} {:?}", group.target, group.labels));
        }
    }
    Ok(moment)
}

/// The names of unfinished files in a folder where a sidecar writes.
pub fn unfinished(folder: &Path) -> Vec<String> {
    let names = |folder: fs::ReadDir| folder.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names: io::Result<Vec<String>> = fs::read_dir(folder).and_then(|folder| names(folder).collect());
    let mut names = names.unwrap_or_default();
    names.retain(|name| name != "lock");
    names
}
