//! What is on disk of a volume: its description and its record.

use std::path::PathBuf;

use everdisk_proto::{ids::VolumeName, volume::VolumeSpec};
use parking_lot::Mutex;

use crate::{
    durable,
    error::{Doing, Error, Result},
    paths::VolumePaths,
    record::VolumeRecord,
};

/// Reads a volume's description.
///
/// # Errors
/// It is missing or damaged.
pub fn read_spec(paths: &VolumePaths, name: &VolumeName) -> Result<VolumeSpec> {
    let file = paths.spec();
    let damaged = |why: String| Error::Failed(format!("{} is damaged: {why}", file.display()));
    let text = durable::read(&file)
        .doing(|| format!("read {}", file.display()))?
        .ok_or_else(|| Error::NotFound(name.to_string()))?;
    let spec: VolumeSpec = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
    spec.validate().map_err(|e| damaged(e.to_string()))?;
    if spec.name == *name { Ok(spec) } else { Err(damaged(format!("it is that of volume {}", spec.name))) }
}

/// The two files, as they were read or written last.
#[derive(Debug)]
pub struct Files {
    spec_path: PathBuf,
    record_path: PathBuf,
    spec: Mutex<VolumeSpec>,
    record: Mutex<VolumeRecord>,
    trouble: Mutex<Option<String>>,
}

impl Files {
    pub(super) fn new(paths: &VolumePaths, spec: VolumeSpec, record: VolumeRecord) -> Self {
        Self {
            spec_path: paths.spec(),
            record_path: paths.record(),
            spec: Mutex::new(spec),
            record: Mutex::new(record),
            trouble: Mutex::new(None),
        }
    }

    pub(super) fn spec(&self) -> VolumeSpec {
        self.spec.lock().clone()
    }

    pub(super) fn set_spec(&self, spec: VolumeSpec) -> Result<()> {
        let text = serde_json::to_vec_pretty(&spec).expect("a description has text keys and plain values");
        durable::write(&self.spec_path, &text).doing(|| "write the volume's description".to_owned())?;
        *self.spec.lock() = spec;
        Ok(())
    }

    pub(super) fn record(&self) -> VolumeRecord {
        self.record.lock().clone()
    }

    pub(super) fn update<T>(&self, change: impl FnOnce(&mut VolumeRecord) -> T) -> Result<T> {
        let mut record = self.record.lock();
        let mut changed = record.clone();
        let result = change(&mut changed);
        if changed != *record {
            self.save(&changed)?;
            *record = changed;
        }
        Ok(result)
    }

    /// Writes the record once more as it is: what a failed update left in its place is not known.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn rewrite_record(&self) -> Result<()> {
        self.save(&self.record.lock())
    }

    fn save(&self, record: &VolumeRecord) -> Result<()> {
        let saved = record.save(&self.record_path);
        *self.trouble.lock() = saved.as_ref().err().map(ToString::to_string);
        saved
    }

    /// Why the record could not be written the last time.
    pub fn record_trouble(&self) -> Option<String> {
        self.trouble.lock().clone()
    }

    /// Checks whether a record that could not be written can be written again.
    pub fn retry_record(&self) {
        if self.record_trouble().is_some() {
            // The trouble itself says whether it succeeded.
            let _ = self.rewrite_record();
        }
    }
}
