"""Plain words of which the keys of needles are put together, such as `brave-otter`."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "able active agile amber ample ancient arid autumn awake azure bashful blithe bold brave breezy brief bright "
    "brisk broad bronze calm candid careful cheerful civil classic clean clear clever cosmic cozy crisp curious "
    "daring dense dusty eager early earnest easy elastic elegant faint fair fancy fast fearless festive fierce "
    "final firm fluent fluffy frank fresh friendly frosty gentle giant glad golden grand green handy happy hardy "
    "hazy hearty heavy hidden hollow honest humble icy ideal jolly keen kind large lavish light little lively "
    "lonely loud loyal lucky lunar major mellow merry mighty mild misty modern modest narrow neat nimble noble "
    "novel odd open orange pale patient plain pleasant polite proud quick quiet rapid rare ready rigid robust rosy "
    "round royal rustic sandy scarlet serene sharp shiny silent silver simple sleek slim smooth snowy soft solar "
    "solid spare spicy stable steady stormy sturdy subtle sunny sweet swift tall tame tidy tiny tranquil trusty "
    "urban vast velvet vivid warm wary wild windy wise witty young zesty "
)

NOUNS = _words(
    "acorn anchor apple apron arrow badge bagel banjo barn basin basket beacon bear bell bench berry bicycle birch "
    "blanket boat bonnet bottle boulder bridge broom bucket button cabin cactus camel candle canoe canyon carpet "
    "castle cedar chair cheese chimney cliff clock cloud clover coat comet compass copper coral cradle crane creek "
    "cricket crown curtain daisy desk dolphin donkey door dragon drum eagle easel ember engine falcon feather fern "
    "fiddle field finch flag flute forest fountain fox garden gate glacier globe goose granite grape guitar hammer "
    "harbor harp hawk hedge helmet heron hill honey horn island ivy jacket jar kettle kite ladder lagoon lake lamp "
    "lantern lemon lily lion lizard lobster magnet mango maple marble market meadow melon mirror mitten moon moth "
    "mountain needle nest oak oasis ocean olive onion orchard otter owl oyster paddle palace parrot pasture peach "
    "pebble pencil pepper piano pillow pine planet plum pocket pond poppy potato prairie pumpkin quilt rabbit raft "
    "raven ribbon river robin rocket rope saddle sail salmon scarf shell ship shore sparrow spoon squirrel stone "
    "stream sugar swan table teapot temple thimble thistle tiger torch tower trail trumpet tulip tunnel turtle "
    "umbrella valley vase village violin wagon walnut whale wheel willow window wolf "
)
