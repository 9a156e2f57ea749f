//! A device as the API tells it: one page of answers, read with as little copying as JSON allows.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

/// Text that borrows from the answer where nothing in it was escaped.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(transparent)]
pub struct Text<'a>(#[serde(borrow)] pub Cow<'a, str>);

/// A device. Each field may be null or missing, whatever the API's model says.
#[derive(Debug, Default, Deserialize)]
#[allow(clippy::struct_field_names)] // as the API names them
pub struct Device<'a> {
    /// Database id: rises with each device that is registered, never used again.
    pub id: Option<u64>,
    /// 32 or 62 lower-case hex digits, checked by [`Device::uuid`].
    #[serde(borrow)]
    uuid: Option<Text<'a>>,
    /// Up to 255 characters of any Unicode; not unique, and a device may set its own.
    #[serde(borrow)]
    pub device_name: Option<Text<'a>>,
    /// `balenaOS 6.1.24`
    #[serde(borrow)]
    pub os_version: Option<Text<'a>>,
    /// `prod`, `dev` or null
    #[serde(borrow)]
    pub os_variant: Option<Text<'a>>,
    /// `16.7.6`
    #[serde(borrow)]
    pub supervisor_version: Option<Text<'a>>,
    /// LAN addresses that the supervisor saw, separated by spaces, both IP versions mixed.
    #[serde(borrow)]
    pub ip_address: Option<Text<'a>>,
    /// Whether the device is connected to the VPN.
    pub is_online: Option<bool>,
    /// Whether the public device URL is switched on.
    pub is_web_accessible: Option<bool>,
    /// `raspberrypi4-64`
    #[serde(borrow, rename = "is_of__device_type")]
    device_type: One<DeviceType<'a>>,
    /// The fleet; a device may be without.
    #[serde(borrow, rename = "belongs_to__application")]
    fleet: One<Fleet<'a>>,
    /// The release that runs; none on a new device.
    #[serde(borrow, rename = "is_running__release")]
    release: One<Release<'a>>,
    /// The device's own tags, in no order.
    #[serde(borrow, rename = "device_tag")]
    tags: Option<Vec<Tag<'a>>>,
}

/// An expanded reference: an array of none or one, or null.
type One<T> = Option<Vec<T>>;

/// The type of a device.
#[derive(Debug, Deserialize)]
pub struct DeviceType<'a> {
    /// `raspberrypi4-64`
    #[serde(borrow)]
    pub slug: Option<Text<'a>>,
}

/// A fleet, which the API calls an application.
#[derive(Debug, Deserialize)]
pub struct Fleet<'a> {
    /// Database id.
    pub id: Option<u64>,
    /// Not unique across organizations.
    #[serde(borrow)]
    pub app_name: Option<Text<'a>>,
    /// `organization/name`, unique.
    #[serde(borrow)]
    pub slug: Option<Text<'a>>,
    /// The owner.
    #[serde(borrow)]
    organization: One<Organization<'a>>,
    #[serde(borrow, rename = "application_tag")]
    tags: Option<Vec<Tag<'a>>>,
}

/// An organization, the owner of fleets.
#[derive(Debug, Deserialize)]
pub struct Organization<'a> {
    /// Its name in slugs.
    #[serde(borrow)]
    pub handle: Option<Text<'a>>,
}

/// A release of a fleet's code.
#[derive(Debug, Deserialize)]
pub struct Release<'a> {
    /// Its commit hash.
    #[serde(borrow)]
    pub commit: Option<Text<'a>>,
    /// Its version, `1.2.3-rc.1`.
    #[serde(borrow)]
    pub raw_version: Option<Text<'a>>,
}

/// A tag of a device or of a fleet.
#[derive(Debug, Deserialize)]
pub struct Tag<'a> {
    /// Up to 100 characters without white space.
    #[serde(borrow, rename = "tag_key")]
    pub key: Text<'a>,
    /// Up to 60,158 characters on a device; may be empty.
    #[serde(borrow)]
    pub value: Option<Text<'a>>,
}

impl Device<'_> {
    /// The uuid, if it is one: 32 or 62 lower-case hex digits, so that it can stand in a host name.
    pub fn uuid(&self) -> Option<&str> {
        self.uuid.as_ref().map(|text| &*text.0).filter(|uuid| {
            matches!(uuid.len(), 32 | 62) && uuid.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        })
    }

    /// The type of the hardware.
    pub fn device_type(&self) -> Option<&DeviceType<'_>> {
        self.device_type.as_ref()?.first()
    }

    /// The fleet; a device may be without.
    pub fn fleet(&self) -> Option<&Fleet<'_>> {
        self.fleet.as_ref()?.first()
    }

    /// The organization that owns its fleet.
    pub fn organization(&self) -> Option<&Organization<'_>> {
        self.fleet()?.organization.as_ref()?.first()
    }

    /// The release that runs; none on a new device.
    pub fn release(&self) -> Option<&Release<'_>> {
        self.release.as_ref()?.first()
    }

    /// The device's own tags, in no order.
    pub fn tags(&self) -> &[Tag<'_>] {
        self.tags.as_deref().unwrap_or_default()
    }

    /// The tags of its fleet, in no order.
    pub fn fleet_tags(&self) -> &[Tag<'_>] {
        self.fleet().and_then(|fleet| fleet.tags.as_deref()).unwrap_or_default()
    }

    /// How people are told of it, since names are not unique: `gw-0001 (cea099a)`.
    pub fn display_name(&self) -> String {
        let uuid = self.uuid.as_ref().map(|text| &*text.0);
        display_name(self.device_name.as_ref().map(|text| &*text.0), uuid, self.id)
    }
}

/// A name with the beginning of the uuid, as balena's own tools show it.
pub fn display_name(name: Option<&str>, uuid: Option<&str>, id: Option<u64>) -> String {
    let name = name.unwrap_or("a device without a name");
    match (uuid, id) {
        (Some(uuid), _) => format!("{name} ({})", uuid.chars().take(7).collect::<String>()),
        (None, Some(id)) => format!("{name} (id {id})"),
        (None, None) => name.to_owned(),
    }
}

/// A device that could not be read.
#[derive(Debug)]
pub struct Broken {
    /// Its id, where that at least was readable.
    pub id: Option<u64>,
    /// How people are told of it.
    pub name: String,
    /// What is wrong with it.
    pub error: String,
}

/// Reads a page, `{"d": [ … ]}`. A device with a field of the wrong type costs itself alone: the page is read
/// typed at first, and device by device only where that fails. An error means that this is no page at all.
pub fn parse_page(body: &[u8]) -> Result<Vec<Result<Device<'_>, Broken>>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Page<T> {
        d: Vec<T>,
    }
    if let Ok(page) = serde_json::from_slice::<Page<Device>>(body) {
        return Ok(page.d.into_iter().map(Ok).collect());
    }
    let page: Page<&RawValue> = serde_json::from_slice(body)?;
    Ok(page.d.into_iter().map(|raw| serde_json::from_str(raw.get()).map_err(|error| broken(raw, &error))).collect())
}

fn broken(raw: &RawValue, error: &serde_json::Error) -> Broken {
    let value: serde_json::Value = serde_json::from_str(raw.get()).unwrap_or_default();
    let id = value["id"].as_u64();
    Broken {
        id,
        name: display_name(value["device_name"].as_str(), value["uuid"].as_str(), id),
        error: error.to_string(),
    }
}
