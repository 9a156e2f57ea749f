//! A device as the API describes it, read from a page with as little copying as JSON allows.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::ops::Deref;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// Text that borrows from the answer where nothing in it was escaped. Text with half a character, `\ud800`, is
/// empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Text<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // serde_json refuses half a character in a string, but not in bytes.
        Ok(Text(match serde_bytes::deserialize(deserializer)? {
            Cow::Borrowed(text) => str::from_utf8(text).unwrap_or_default().into(),
            Cow::Owned(text) => String::from_utf8(text).unwrap_or_default().into(),
        }))
    }
}

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

/// The most characters of a device's name, by balena's own limit.
const MAX_NAME_LENGTH: usize = 255;

/// The most bytes of a record that is read a second time, into ten times as many.
const MAX_MENDED_SIZE: usize = 1 << 20;

const MAX_UUID_LENGTH: usize = 62;

/// Reads an expanded reference, which is an array of none or one, or null. A field that is read so may be missing as well, by
/// `serde(default)`.
pub fn one<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    let items = Option::<Vec<T>>::deserialize(deserializer)?;
    Ok(items.and_then(|items| items.into_iter().next()))
}

/// A device. Each field may be null or missing, whatever the API's model says.
#[derive(Debug, Default, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
#[allow(clippy::struct_field_names)] // as the API names them
pub struct Device<'a> {
    /// Database id: a device that is registered later has a higher one, and no id is used twice.
    pub id: Option<u64>,
    /// 32 or 62 lower-case hex digits, checked by [`Device::uuid`].
    uuid: Option<Text<'a>>,
    /// Up to 255 characters of any Unicode; not unique, and a device may set its own.
    pub device_name: Option<Text<'a>>,
    /// `balenaOS 6.1.24`
    pub os_version: Option<Text<'a>>,
    /// `prod`, `dev` or null
    pub os_variant: Option<Text<'a>>,
    /// `16.7.6`
    pub supervisor_version: Option<Text<'a>>,
    /// LAN addresses that the supervisor saw, separated by spaces, both IP versions mixed.
    pub ip_address: Option<Text<'a>>,
    /// Whether the device is connected to the VPN.
    pub is_connected_to_vpn: Option<bool>,
    /// Whether the public device URL is switched on.
    pub is_web_accessible: Option<bool>,
    /// `raspberrypi4-64`
    #[serde(rename = "is_of__device_type", default, deserialize_with = "one")]
    pub device_type: Option<DeviceType<'a>>,
    /// The fleet; a device may have none.
    #[serde(rename = "belongs_to__application", default, deserialize_with = "one")]
    pub fleet: Option<Fleet<'a>>,
    /// The release that runs; none on a new device.
    #[serde(rename = "is_running__release", default, deserialize_with = "one")]
    pub release: Option<Release<'a>>,
    /// The device's own tags, in no order.
    #[serde(rename = "device_tag")]
    tags: Option<Vec<Tag<'a>>>,
    /// Why the record cannot be used; then only the id, the uuid and the name are set.
    #[serde(skip)]
    pub broken: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct DeviceType<'a> {
    /// `raspberrypi4-64`
    pub slug: Option<Text<'a>>,
}

/// A fleet, which the API calls an application.
#[derive(Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct Fleet<'a> {
    pub id: Option<u64>,
    /// Not unique across organizations.
    pub app_name: Option<Text<'a>>,
    /// `organization/name`, unique.
    pub slug: Option<Text<'a>>,
    #[serde(default, deserialize_with = "one")]
    pub organization: Option<Organization<'a>>,
    #[serde(rename = "application_tag")]
    tags: Option<Vec<Tag<'a>>>,
}

#[derive(Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct Organization<'a> {
    /// Its name in slugs.
    pub handle: Option<Text<'a>>,
}

/// A release of a fleet's code, of the OS or of the supervisor, as far as it is asked for.
#[derive(Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct Release<'a> {
    pub id: Option<NonZeroU64>,
    pub commit: Option<Text<'a>>,
    /// Its version, `1.2.3-rc.1`.
    pub raw_version: Option<Text<'a>>,
}

/// A tag of a device or of a fleet.
#[derive(Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct Tag<'a> {
    /// Up to 100 characters without white space.
    #[serde(rename = "tag_key")]
    pub key: Option<Text<'a>>,
    /// Up to 60,158 characters on a device; may be empty.
    pub value: Option<Text<'a>>,
}

impl Device<'_> {
    /// The uuid, if it is one: 32 or 62 lower-case hex digits, so that it can stand in a host name.
    pub fn uuid(&self) -> Option<&str> {
        self.uuid.as_deref().filter(|uuid| {
            matches!(uuid.len(), 32 | 62) && uuid.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        })
    }

    /// The device's own tags, in no order.
    pub fn tags(&self) -> &[Tag<'_>] {
        self.tags.as_deref().unwrap_or_default()
    }

    /// The tags of its fleet, in no order.
    pub fn fleet_tags(&self) -> &[Tag<'_>] {
        self.fleet.as_ref().and_then(|fleet| fleet.tags.as_deref()).unwrap_or_default()
    }

    pub fn release_id(&self) -> Option<u64> {
        self.release.as_ref()?.id.map(NonZeroU64::get)
    }

    /// How it is shown to people, since names are not unique: `gw-0001 (cea099a)`. A device without a name is shown by its whole
    /// uuid.
    pub fn display_name(&self) -> String {
        display_name(self.device_name.as_deref(), self.uuid.as_deref(), self.id)
    }
}

/// A name with the beginning of the uuid, as balena's own tools show it, or the uuid alone.
pub fn display_name(name: Option<&str>, uuid: Option<&str>, id: Option<u64>) -> String {
    const NO_NAME: &str = "a device without a name";
    let name = name.filter(|name| !name.trim().is_empty()).map(|name| up_to(MAX_NAME_LENGTH, name));
    let uuid = uuid.filter(|uuid| !uuid.trim().is_empty());
    match (name, uuid, id) {
        (Some(name), Some(uuid), _) => format!("{name} ({})", up_to(7, uuid)),
        (None, Some(uuid), _) => up_to(MAX_UUID_LENGTH, uuid).into(),
        (name, None, Some(id)) => format!("{} (id {id})", name.unwrap_or(NO_NAME)),
        (name, None, None) => name.unwrap_or(NO_NAME).into(),
    }
}

/// The first characters of a text.
pub fn up_to(length: usize, text: &str) -> &str {
    text.char_indices().nth(length).map_or(text, |(end, _)| &text[..end])
}

/// The records of a page, `{"d": [ … ]}`.
pub fn records(body: &[u8]) -> Result<Vec<&RawValue>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Body<'a> {
        #[serde(borrow)]
        d: Vec<&'a RawValue>,
    }
    serde_json::from_slice(body).map(|body: Body| body.d)
}

/// Reads a record. If a key is there twice, the last value counts.
pub fn read<'a, T: Deserialize<'a>>(raw: &'a RawValue) -> Result<T, serde_json::Error> {
    serde_json::from_str(raw.get()).or_else(|error| {
        let value = Some(raw.get())
            .filter(|text| text.len() <= MAX_MENDED_SIZE)
            .and_then(|text| serde_json::from_str(text).ok());
        value.and_then(|value: serde_json::Value| T::deserialize(value).ok()).ok_or(error)
    })
}

/// The id of a record, whatever else is wrong with it.
pub fn id(raw: &RawValue) -> Option<u64> {
    #[derive(Deserialize)]
    struct OnlyId {
        id: Option<u64>,
    }
    serde_json::from_str::<OnlyId>(raw.get()).ok()?.id
}

/// Reads a device. A field of the wrong type makes this device unusable and does not affect the others.
pub fn parse(raw: &RawValue) -> Device<'_> {
    read(raw).unwrap_or_else(|error| broken(raw, &error))
}

/// Reads a page.
pub fn parse_page(body: &[u8]) -> Result<Vec<Device<'_>>, serde_json::Error> {
    Ok(records(body)?.into_iter().map(parse).collect())
}

/// What is wrong, without the text that serde quotes, which may be long or a secret.
pub fn describe(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let quoted = text.split_once('"').zip(text.rsplit_once('"'));
    quoted.map(|((before, _), (_, after))| format!("{before}…{after}")).unwrap_or(text)
}

fn broken<'a>(raw: &RawValue, error: &serde_json::Error) -> Device<'a> {
    // Field by field, since one field may make the whole record unreadable.
    let fields: BTreeMap<&str, &RawValue> = serde_json::from_str(raw.get()).unwrap_or_default();
    let text = |name| Some(Text(serde_json::from_str::<String>(fields.get(name)?.get()).ok()?.into()));
    let id = fields.get("id").and_then(|raw| serde_json::from_str(raw.get()).ok());
    let broken = Some(describe(error));
    Device { id, uuid: text("uuid"), device_name: text("device_name"), broken, ..Device::default() }
}

/// The value of the tag with this key; null counts as empty. If a key occurs twice, the lesser value counts, since the API's
/// order may change.
pub fn tag_value<'a>(tags: &'a [Tag], key: &str) -> Option<&'a str> {
    let named = tags.iter().filter(|tag| tag.key.as_deref() == Some(key));
    named.map(|tag| tag.value.as_deref().unwrap_or_default()).min()
}
