//! The devices of the list, each with what is known of it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::record_lists::RecordPages;
use super::reported::{DeviceState, SupervisorReport};
use super::services::{DeviceServices, NotRunning, Running};
use crate::discovery::entry::{DevicePage, Entry};

/// The devices by ascending id, as discovery has published them.
pub type DeviceList = Arc<Vec<Arc<DevicePage>>>;

/// What is known of the devices.
#[derive(Clone, Default)]
pub struct FleetState {
    pub states: RecordPages<DeviceState>,
    /// When that was read last.
    pub states_read: Option<SystemTime>,
    pub reports: RecordPages<SupervisorReport>,
    /// What runs on them; none where the API did not say it the last time that it was asked.
    pub installs: Option<Installs>,
    /// When that was read last.
    pub installs_read: Option<SystemTime>,
}

#[derive(Clone, Default)]
pub struct Installs {
    not_running: RecordPages<NotRunning>,
    /// Page and place of each, by the id of its device.
    by_device: Arc<HashMap<u64, Vec<(u32, u32)>>>,
    running: RecordPages<Running>,
}

impl Installs {
    pub fn new(not_running: RecordPages<NotRunning>, running: RecordPages<Running>) -> Self {
        let mut by_device = HashMap::<_, Vec<_>>::new();
        for (page, installs) in (0..).zip(&not_running) {
            for (place, (_, install)) in (0..).zip(&**installs) {
                by_device.entry(install.device).or_default().push((page, place));
            }
        }
        Installs { not_running, by_device: by_device.into(), running }
    }

    pub fn all_not_running(&self) -> impl Iterator<Item = &NotRunning> {
        self.not_running.iter().flat_map(|page| &**page).map(|(_, install)| install)
    }

    fn not_running_on(&self, device: u64) -> Vec<&NotRunning> {
        let places = self.by_device.get(&device).into_iter().flatten();
        let install = |(page, place): &(u32, u32)| self.not_running.get(*page as usize)?.get(*place as usize);
        places.filter_map(install).map(|(_, install)| install).collect()
    }
}

#[derive(Clone, Copy, Default)]
pub struct Cursor {
    page: usize,
    place: usize,
}

impl Cursor {
    /// The device here, after which the cursor moves on.
    pub fn next<'a>(&mut self, list: &'a [Arc<DevicePage>]) -> Option<&'a Entry> {
        loop {
            if let Some(entry) = list.get(self.page)?.entries.get(self.place) {
                self.place += 1;
                return Some(entry);
            }
            *self = Cursor { page: self.page + 1, place: 0 };
        }
    }

    /// The item with this id, which is asked for in ascending order.
    fn find<'a, T>(&mut self, pages: &'a [Arc<Vec<(u64, T)>>], id: u64) -> Option<&'a T> {
        loop {
            let page = pages.get(self.page)?;
            match page.get(self.place) {
                None => *self = Cursor { page: self.page + 1, place: 0 },
                Some((known, _)) if *known < id => self.place += 1,
                Some((known, record)) => return (*known == id).then_some(record),
            }
        }
    }
}

/// A device, and what is known of it.
pub struct ListedDevice<'a> {
    pub entry: &'a Entry,
    pub state: Option<&'a DeviceState>,
    pub report: Option<&'a SupervisorReport>,
    /// Its services, where they are known.
    pub services: Option<DeviceServices<'a>>,
}

/// Goes through all devices by ascending id.
pub struct ListedDevices {
    list: DeviceList,
    known: FleetState,
    entry: Cursor,
    state: Cursor,
    report: Cursor,
    running: Cursor,
}

impl ListedDevices {
    pub fn new(list: DeviceList, known: FleetState) -> Self {
        let start = Cursor::default();
        ListedDevices { list, known, entry: start, state: start, report: start, running: start }
    }

    /// Goes back to the first device.
    pub fn rewind(&mut self) {
        *self = ListedDevices::new(self.list.clone(), self.known.clone());
    }

    pub fn next(&mut self) -> Option<ListedDevice<'_>> {
        let entry = self.entry.next(&self.list)?;
        let Some(id) = entry.id() else {
            return Some(ListedDevice { entry, state: None, report: None, services: None });
        };
        let state = self.state.find(&self.known.states, id);
        let report = self.report.find(&self.known.reports, id);
        let services = self.known.installs.as_ref().zip(state).and_then(|(installs, state)| {
            let running = self.running.find(&installs.running, id).map_or(&[][..], |images| images);
            DeviceServices::of(state, entry.common.declared.as_deref(), running, installs.not_running_on(id))
        });
        Some(ListedDevice { entry, state, report, services })
    }
}
