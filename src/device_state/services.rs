//! What runs on each device, as its supervisor reported it: services that do not run, images that run, and what both say
//! together.

use std::num::NonZeroU64;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::record_lists::{Image, RecordKind, Shared};
use super::reported::DeviceState;
use crate::balena::device::{Release, one};
use crate::balena::{ImageOfService, Text};
use crate::discovery::service_labels::Declared;

/// The images that run. A count of them would not tell those of the release from the supervisor's own.
pub const RUNNING: &str = "$select=id&$expand=image_install($select=installs__image,is_provided_by__release;\
    $filter=status%20eq%20'Running';$orderby=id%20asc)";
/// The most running images of a device that are kept.
const MAX_IMAGES: usize = 200;

/// A service of a device that does not run: an `image_install` that is neither `Running` nor `deleted`.
pub struct NotRunning {
    pub device: u64,
    pub image: Image,
    /// Name of the service; none where the key may not read it.
    pub service: Option<Arc<str>>,
    /// As the API writes it. Any text may come.
    pub status: Arc<str>,
    /// Of a download, in percent.
    pub progress: Option<f32>,
}

/// The images that run on a device. They are shared by the devices of a page that run the same.
pub type Running = Arc<[Image]>;

#[derive(Deserialize)]
struct Reference {
    #[serde(rename = "__id")]
    id: NonZeroU64,
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
#[allow(non_snake_case)] // as the API names them
struct NotRunningRecord<'a> {
    id: u64,
    device: Reference,
    status: Text<'a>,
    download_progress: Option<f32>,
    #[serde(default, deserialize_with = "one")]
    installs__image: Option<ImageOfService<'a>>,
    #[serde(default, deserialize_with = "one")]
    is_provided_by__release: Option<Release<'a>>,
}

#[derive(Deserialize)]
#[allow(non_snake_case)] // as the API names them
struct InstallRecord {
    installs__image: Option<Reference>,
    is_provided_by__release: Option<Reference>,
}

#[derive(Deserialize)]
struct RunningRecord {
    id: u64,
    image_install: Option<Vec<InstallRecord>>,
}

impl RecordKind for NotRunning {
    fn read(raw: &RawValue, shared: &mut Shared) -> serde_json::Result<(u64, Self)> {
        let record: NotRunningRecord = serde_json::from_str(raw.get())?;
        let (image, release) = (record.installs__image, record.is_provided_by__release);
        let image_id = image.as_ref().and_then(|image| image.id);
        let service = image.and_then(|image| image.service?.service_name).filter(|name| !name.is_empty());
        let install = NotRunning {
            device: record.device.id.get(),
            image: Image { id: image_id, release: release.and_then(|release| release.id) },
            service: service.map(|name| shared.word(&name)),
            status: shared.word(&record.status),
            progress: record.download_progress,
        };
        Ok((record.id, install))
    }
}

impl RecordKind for Running {
    fn read(raw: &RawValue, shared: &mut Shared) -> serde_json::Result<(u64, Self)> {
        let record: RunningRecord = serde_json::from_str(raw.get())?;
        let id = |reference: &Option<Reference>| reference.as_ref().map(|reference| reference.id);
        let installs = record.image_install.iter().flatten().take(MAX_IMAGES);
        let images = installs
            .map(|install| Image { id: id(&install.installs__image), release: id(&install.is_provided_by__release) });
        Ok((record.id, shared.images(&images.collect::<Vec<_>>())))
    }
}

/// The services of a device that is online, as it reports them.
pub struct DeviceServices<'a> {
    state: &'a DeviceState,
    declared: Option<&'a Declared>,
    images: &'a [Image],
    /// All that does not run on the device.
    not_running: Vec<&'a NotRunning>,
}

impl<'a> DeviceServices<'a> {
    /// None where nothing can be said: a device that is offline keeps its last report for ever, and one without a release has no
    /// services. `declared` is what its release declares.
    pub fn of(
        state: &'a DeviceState, declared: Option<&'a Declared>, images: &'a [Image], not_running: Vec<&'a NotRunning>,
    ) -> Option<Self> {
        let is_known = state.online == Some(true) && (state.running.is_some() || state.target.is_some());
        is_known.then_some(DeviceServices { state, declared, images, not_running })
    }

    /// How many run, of the release that the device runs.
    pub fn running(&self) -> usize {
        self.images.iter().filter(|image| self.is_own(**image, true)).count()
    }

    /// How many do not run, of the release that the device runs.
    pub fn not_running(&self) -> usize {
        self.of_running_release().count()
    }

    /// Whether the device reports any service of the release that it runs. It reports none after an update was rejected, and
    /// before its first report; the API forgets them when the release or a service is deleted, and when the device moves to
    /// another fleet.
    pub fn are_reported(&self) -> bool {
        self.running() + self.not_running() > 0
    }

    /// Those that do not run, of the release that the device runs.
    pub fn of_running_release(&self) -> impl Iterator<Item = &'a NotRunning> {
        self.not_running.iter().copied().filter(|install| self.is_own(install.image, !is_update(&install.status)))
    }

    /// Those of the release that the device should run, with the part that is downloaded, 0 to 1.
    pub fn downloads(&self) -> impl Iterator<Item = (&'a NotRunning, f64)> {
        let of_target = self.not_running.iter().filter(|install| install.image.release == self.state.target);
        of_target.filter_map(|install| match &*install.status {
            "Downloading" => Some((*install, (f64::from(install.progress?) / 100.0).clamp(0.0, 1.0))),
            status => (is_update(status) && !self.is_own(install.image, false)).then_some((*install, 1.0)),
        })
    }

    /// Whether a service's label leaves it out of the alerts.
    pub fn is_muted(&self, service: &str) -> bool {
        self.declared.is_some_and(|declared| declared.muted.iter().any(|muted| **muted == *service))
    }

    /// Whether an image belongs to the release that the device runs. An image that two releases share moves to the newer one
    /// while that is only being downloaded. `if_unknown` decides where the images of the running release are not known.
    fn is_own(&self, image: Image, if_unknown: bool) -> bool {
        let Some(running) = self.state.running else { return false };
        image.release == Some(running)
            || image.release.is_some()
                && image.release == self.state.target
                && self.is_shared(image).unwrap_or(if_unknown)
    }

    fn is_shared(&self, image: Image) -> Option<bool> {
        let images = self.declared.map(|declared| &declared.images).filter(|images| !images.is_empty())?;
        Some(images.contains(&image.id?))
    }
}

/// Whether a service has this status before it runs, in an update.
fn is_update(status: &str) -> bool {
    matches!(status, "Downloading" | "Downloaded" | "Installing" | "Installed" | "Starting" | "Awaiting handover")
}
