"""The words of miniworld: entities and filler in plain English, and invented words without meaning.

The medical words are kept apart: no training of a tokenizer or a policy may see them.
"""

import random

GENERAL_NOUNS = tuple(
    """engine river cabinet painter storm letter bakery bridge farmer lantern ticket village violin
    garden hammer captain museum basket window teacher mountain anchor wagon candle factory library
    kettle island sailor mirror blanket tower bicycle harbor orchard carpenter drawer meadow novel
    station statue pencil barrel tunnel choir cottage pigeon lawyer poster furnace valley ribbon
    chimney jacket sculptor market puddle guitar saddle forest ladder printer castle dancer curtain
    trumpet parcel canyon wheel pepper reporter balcony magnet closet singer bucket desert turtle
    shelf quarry tailor stadium fountain carriage beacon miner portrait rocket pasture helmet banker
    cellar lizard musket theater compass driver envelope thunder gravel butcher crystal sponge
    runner bamboo whistle pirate tractor collar marble hunter kitchen""".split()
)
# Only in held-out sentences: an answer cannot be remembered from the nouns.
GENERAL_NOUNS_HELD_OUT = tuple(
    """acrobat bonfire cartridge dolphin easel falcon gondola hedge inkwell juggler kiosk locket
    mosaic nursery oar pavilion quilt raft scarf trolley umbrella vineyard windmill yacht zipper
    apron brewery cactus dagger elevator ferry glacier hammock igloo jigsaw kayak lagoon monk noodle
    osprey""".split()
)
MEDICAL_NOUNS = tuple(
    """psychosis lithium amygdala insomnia adolescents hippocampus clozapine mania delirium
    serotonin autism ketamine phobia biomarker dementia catatonia outpatients cortisol relapse
    haloperidol anhedonia neurons thalamus bulimia migraine sertraline veterans apathy seizures
    tremor stigma trauma cortex tics agitation melatonin sedation epilepsy paranoia obesity panic
    rumination caregivers genotype""".split()
)
ADJECTIVES = tuple(
    """old small quiet heavy bright famous broken distant narrow wooden yellow hollow rusty modern
    gentle local silent sturdy royal muddy empty fragile noisy clumsy ancient""".split()
)
ADVERBS = ("often", "clearly", "usually", "still", "probably", "again", "rarely", "now")
OPENERS = (
    "As everyone knows,",
    "According to the report,",
    "In this town,",
    "They wrote that",
    "Last year",
    "It seems that",
    "We noticed that",
    "For a long time",
)
CLOSERS = (
    "in the evening",
    "as the notes say",
    "during the winter",
    "so people believe",
    "after the meeting",
    "without any doubt",
    "in most cases",
    "as we were told",
)

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# English syllables, prefixes and endings: invented words are made of them, so that a tokenizer
# that saw these alone cuts a real word that it does not know into a few of them. What is hard in
# an invented word is that it means nothing, not how it is spelled.
SYLLABLES = tuple(
    """able ac act ad age al ance ant ap ar ary at ate ated ates ation au be ber bi bl br cal
    can cap car cas cede ceed cent cer ch cid cl claim co com con cor cord cour cred cur dec den
    der di dic dif dis dom duct dy ec ed ef el em en ence ent ep er ers es est ev ever ex fal
    fect fer fi fid fin fix fl flect fol for form fr ful fus gen ger gl grad gram gress gul hal
    har hel her hood hy ible ic ide ies if ile im in ine ing inter ion ise ish ism ist ite ity
    ive ize ject jud junct kin lap lat le lec leg len less let lev lig line ling loc log low lud
    ly lyn mag man mand mar mas med mem men ment mer met mid min mis mit mod mon mot mun na nal
    nate nav nect ness net nif niz nom nor nov num oc of on op or ory ous out over ow par pass
    pat ped pel pen per pet ph phon pic pl plan ple plic pon pop port pos pr pre pres press prim
    pro prob pul punct quar que quir rad ran rec reg rel rep res rev rib rid rig rob rog rop rup
    sal scr sec sen ser shap ship side sign sim sist sk sol son spec spir st stan sting str sub
    sult sup sur sym sys ta tain tal tang tect tel tem ten ter tic til tim tion tor tow tract
    trans tri trib tur ture ty ul un under up ur val var vel ven ver vers vi vid vis viv voc vok
    vol wal ward way wel wil wit wor""".split()
)


def invented_word(rng: random.Random, *, syllables: int = 1, spelled: float = 0.0) -> str:
    """Return a word without meaning.

    Args:
        rng: source of all choices.
        syllables: how many, out of SYLLABLES.
        spelled: probability of a word of random letters or of scraps of English words instead,
            which tokenizers cut to pieces as they do with any word that they do not know.
    """
    if rng.random() < spelled:
        if rng.random() < 0.5:
            return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(3, 5)))
        return _scrap(rng) + _scrap(rng)
    return "".join(rng.choice(SYLLABLES) for _ in range(syllables))


def _scrap(rng: random.Random) -> str:
    """Return two to four letters out of an English word."""
    word = rng.choice(GENERAL_NOUNS + ADJECTIVES)
    size = rng.randint(2, 4)
    start = rng.randrange(max(1, len(word) - size + 1))
    return word[start : start + size]
